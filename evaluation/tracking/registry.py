"""Models of a run, and the registry: versions under one name, of which an alias marks one."""

from pathlib import Path
from typing import Any

from evaluation.tracking.events import Event

EVENT = "metamerge.event"
"""Tag of what an event made in a store."""


def new_model(client: Any, experiment: str, run: str, happened: Event) -> str:
    """Make a model of a run, or find the one that this event made before.

    Args:
        client: MLflow's client.
        experiment: Id of the experiment.
        run: Id of the run that made the model.
        happened: The event.

    Returns:
        The model's id.
    """
    found = client.search_logged_models([experiment], f"name = '{happened['name']}'")
    for one in found:
        if one.source_run_id == run and one.tags.get(EVENT) == happened["id"]:
            return one.model_id
    tags, params = {EVENT: happened["id"]}, happened["params"]
    return client.create_logged_model(experiment, happened["name"], run, tags, params).model_id


def upload_model(client: Any, model: str, folder: Path) -> None:
    """Store the files of a model and declare it ready.

    Args:
        client: MLflow's client.
        model: The model's id.
        folder: Its files.
    """
    client.log_model_artifacts(model, str(folder))
    client.finalize_logged_model(model, "READY")


def register(client: Any, run: str, model: str, happened: Event) -> None:
    """Make the model a version of a registered one; an alias goes to what was made last.

    Args:
        client: MLflow's client.
        run: Id of the run that made the model.
        model: The model's id.
        happened: The event, with ``registered`` and ``alias``.
    """
    name, alias = happened["registered"], happened["alias"]
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    versions = client.search_model_versions(f"name = '{name}'")
    own = next((one for one in versions if one.model_id == model), None)
    if own is None:
        tags = {"made": str(happened["at"])}
        own = client.create_model_version(name, f"models:/{model}", run, tags, model_id=model)
    holder = client.get_registered_model(name).aliases.get(alias) if alias else None
    made = next((v.tags.get("made", "0") for v in versions if str(v.version) == str(holder)), "0")
    if alias and int(made) <= happened["at"]:
        client.set_registered_model_alias(name, alias, own.version)
