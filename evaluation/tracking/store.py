"""A store of MLflow and what events do to it; no other file of this room imports mlflow.

It is imported on first use, as that takes a second.
"""

import copy
import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.tracking.databases import migrated, sqlite_file, store_address
from evaluation.tracking.events import HANDLE, Event, warn
from evaluation.tracking.processes import HOST, is_gone, process_tags
from evaluation.tracking.registry import EVENT, new_model, register, upload_model

if TYPE_CHECKING:
    from torch import Tensor, nn

ENVIRONMENT = {  # what the user's own environment sets wins
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
CHECKPOINT = "checkpoint"  # folder of a model that metamerge reads
GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # answers of a store that is well


class Store:
    """An MLflow store that has answered, and an experiment in it.

    Args:
        uri: Address; by default MLFLOW_TRACKING_URI, else ``mlflow.db`` in the working directory.
        experiment: Created when missing, restored when deleted.

    Attributes:
        uri: The address.
        client: MLflow's client.
        experiment: The experiment's id.
    """

    def __init__(self, uri: str | None, experiment: str) -> None:
        mlflow, self.uri = _mlflow(), store_address(uri)
        with migrated(self.uri, _upgrade):
            self.client = mlflow.MlflowClient(self.uri)
            folder, file = None, sqlite_file(self.uri)
            if file:
                name = re.sub(r"\W", "_", experiment)[:100]
                folder = (file.parent / "mlruns" / name).as_uri()
            self.experiment = _find_experiment(self.client, experiment, folder)
        self._last_step: dict[tuple[str, str], int] = {}  # where curves of resumed runs ended

    def find(self, handle: str) -> Any:
        """The run of an id, or the one that an event made.

        Args:
            handle: Id of a run, or of an event.

        Returns:
            The run, None where there is none.

        Raises:
            MlflowException: If the store does not answer.
        """
        from mlflow import MlflowException

        if handle.startswith(HANDLE):
            wanted = f"tags.`{EVENT}` = '{handle}'"
            return next(iter(self.client.search_runs([self.experiment], wanted)), None)
        try:
            run = self.client.get_run(handle)
        except MlflowException as error:
            if error.error_code in GONE:
                return None
            raise
        return None if run.info.lifecycle_stage == "deleted" else run

    def start(self, happened: Event, *, again: bool = False) -> str:
        """Create a run, or take one up again.

        Args:
            happened: The event.
            again: Whether the event may have reached the store before.

        Returns:
            The run's id.
        """
        resume = happened["resume"]
        found = self.find(resume) if resume else None
        if resume and found is None:
            warn(f"there is no run {resume!r} to resume, a new one is started")
        if found is None and again:
            found = self.find(happened["id"])
        if found is None:
            tags = {**happened["context"], **happened["process"], EVENT: happened["id"]}
            name = happened["name"][:250]
            return self.client.create_run(self.experiment, happened["at"], tags, name).info.run_id
        run = found.info.run_id
        for key, value in happened["process"].items():  # before the status: who looks must see both
            self.client.set_tag(run, key, value)
        self.client.update_run(run, status="RUNNING")
        for stale in {"error", "unsent", "reconciled"} & set(found.data.tags):
            self.client.delete_tag(run, stale)
        return run

    def apply(self, run: str, happened: Event, *, again: bool = False) -> str | None:
        """Do in the store what an event says.

        Args:
            run: Id of the run that it belongs to.
            happened: The event; ``path`` names a file or folder of this machine.
            again: Whether the event may have reached the store before.

        Returns:
            Id of the run or model that it made.
        """
        match happened["do"]:
            case "options":
                self._options(run, happened["values"])
            case "tags":
                self._log(run, tags=happened["values"])
            case "metrics":
                self._metrics(run, happened)
            case "inputs":
                self.client.log_inputs(run, [_dataset_input(one) for one in happened["inputs"]])
            case "artifact":
                path, into = Path(happened["path"]), happened["into"]
                if path.is_dir():
                    into = "/".join(filter(None, (into, path.name)))
                    self.client.log_artifacts(run, str(path), into)
                else:
                    self.client.log_artifact(run, str(path), into)
            case "child":
                return self._child(run, happened, again)
            case "model":
                return self._model(run, happened)
            case "end":
                self.client.set_terminated(run, happened["status"], happened["at"])
                self._log(run, tags=happened["tags"])
        return None

    def reconcile(self) -> None:
        """Mark runs as KILLED whose process, one of this host, has ended without a word."""
        here = process_tags().get(HOST)
        if not here:
            return
        everywhere = [one.experiment_id for one in self.client.search_experiments()]
        wanted = f"attributes.status = 'RUNNING' AND tags.`{HOST}` = '{here}'"
        for run in self.client.search_runs(everywhere, wanted):
            if is_gone(run.data.tags):
                self.client.set_terminated(run.info.run_id, "KILLED")
                self.client.set_tag(run.info.run_id, "reconciled", "its process was gone")

    @contextmanager
    def system_metrics(self, run: str) -> Iterator[None]:
        """Log load, memory and network of this machine while the body runs.

        Args:
            run: Id of the run.

        Yields:
            Nothing.
        """
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run, resume_logging=True, tracking_uri=self.uri)
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()

    # ------------------------------------------------------------------------------ what it logs

    def _options(self, run: str, values: Mapping[str, str]) -> None:
        """An option that the run knows with another value becomes a tag."""
        known = self.client.get_run(run).data.params
        fitting = {key: self._fit(run, key, text, 6000) for key, text in values.items()}
        changed = {f"changed.{k}": t for k, t in fitting.items() if known.get(k, t) != t}
        self._log(run, {k: t for k, t in fitting.items() if k not in known}, changed)

    def _metrics(self, run: str, happened: Event) -> None:
        """Points that a resumed curve has already are left out."""
        points = happened["values"]
        if happened["resumed"]:
            points = [p for p in points if p[2] is None or p[2] > self._end_of_curve(run, p[0])]
        self._log(run, points=points, at=happened["at"])

    def _log(
        self,
        run: str,
        options: Mapping[str, str] = {},
        tags: Mapping[str, str] = {},
        points: Sequence = (),
        at: int = 0,
    ) -> None:
        """As few requests as it takes; a request holds 100 of each kind."""
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(key, value, at, step or 0) for key, value, step in points]
        params = [Param(key, self._fit(run, key, text, 6000)) for key, text in options.items()]
        labels = [RunTag(key, self._fit(run, key, text, 8000)) for key, text in tags.items()]
        for first in range(0, max(map(len, (metrics, params, labels))), 100):
            batch = (kind[first : first + 100] for kind in (metrics, params, labels))
            self.client.log_batch(run, *batch, synchronous=True)

    def _end_of_curve(self, run: str, key: str) -> float:
        if (run, key) not in self._last_step:
            history = self.client.get_metric_history(run, key)
            last = max((metric.step for metric in history), default=-math.inf)
            self._last_step[run, key] = last
        return self._last_step[run, key]

    def _fit(self, run: str, key: str, text: str, limit: int) -> str:
        """Cut ``text`` to what the store takes; the whole becomes an artifact."""
        if len(text) <= limit:
            return text
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        filename = f"long/{key.replace('/', '_')[:100]}-{digest}.txt"
        self.client.log_text(run, text, filename)
        return f"{text[: limit - 200]} ... (whole: artifact {filename})"

    def _child(self, run: str, happened: Event, again: bool) -> str:
        found, at = self.find(happened["id"]) if again else None, happened["at"]
        if found is None:
            begin, name = at - round(1000 * happened["seconds"]), happened["name"][:250]
            tags = {**happened["context"], "mlflow.parentRunId": run, EVENT: happened["id"]}
            found = self.client.create_run(self.experiment, begin, tags, name)
        child, status = found.info.run_id, "FAILED"
        try:
            self._log(child, *(happened[k] for k in ("options", "tags", "metrics")), at)
            if happened["inputs"]:
                datasets = [_dataset_input(one) for one in happened["inputs"]]
                self.client.log_inputs(child, datasets)
            status = "FINISHED"
        finally:
            self.client.set_terminated(child, status, at)
        return child

    def _model(self, run: str, happened: Event) -> str:
        """Log a folder that is a model of MLflow, register it, give it an alias."""
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        child = self.find(happened["of"]) if happened["of"] else None
        owner = child.info.run_id if child else run
        model = new_model(self.client, self.experiment, owner, happened)
        folder = Path(happened["path"])
        description = Model.load(folder / "MLmodel")
        description.model_id = description.model_uuid = model
        description.run_id, description.artifact_path = owner, happened["name"]
        description.save(folder / "MLmodel")
        upload_model(self.client, model, folder)
        self.client.log_outputs(owner, [LoggedModelOutput(model, 0)])
        if happened["registered"]:
            register(self.client, owner, model, happened)
        return model


def context_tags() -> dict[str, str]:
    """User, program and commit, as MLflow tells them.

    Returns:
        Tags of a run.
    """
    _mlflow()
    from mlflow.tracking.context.registry import resolve_tags

    return dict(resolve_tags())


def concerns_one_call(failure: Exception) -> bool:
    """Whether a store that is well refused what it was given.

    Args:
        failure: What it raised.

    Returns:
        False where the store is at fault.
    """
    if getattr(failure, "error_code", "") == "INVALID_PARAMETER_VALUE":
        return True
    answer = isinstance(failure, OSError | json.JSONDecodeError)  # what a server sent is no answer
    return isinstance(failure, ValueError | TypeError) and not answer


def write_model(
    folder: Path, checkpoint: Path, network: "nn.Module | None", example: "Tensor | None"
) -> None:
    """Make a folder that is a model of MLflow, around a checkpoint that metamerge reads.

    Args:
        folder: Where; made here.
        checkpoint: Folder of the checkpoint, or of a merger.
        network: The network that carries the weights; it is exported, and MLflow loads it as a
            model of PyTorch. None for what is no network, as mergers are.
        example: Inputs of the network, ``[b, ...]``; how many there are does not matter later.
    """
    _mlflow()
    import torch
    from mlflow import pytorch
    from mlflow.models import Model

    description = Model()
    if network is not None:
        network = copy.deepcopy(network).cpu().eval()
        several = example if len(example) > 1 else example.expand(2, *example.shape[1:])
        with warnings.catch_warnings(action="ignore"):
            pytorch.save_model(
                network,
                str(folder),
                mlflow_model=description,
                input_example=several.cpu().numpy(),  # one alone would be exported as the only size
                pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],
            )
    shutil.copytree(checkpoint, folder / CHECKPOINT)
    description.add_flavor("metamerge", checkpoint=CHECKPOINT)
    description.save(str(folder / "MLmodel"))


def _mlflow() -> Any:
    """MLflow, set up so that it fails soon, says little and sends nothing."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    with warnings.catch_warnings(action="ignore"):
        import mlflow
    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())
    return mlflow


def _upgrade(uri: str) -> None:
    with warnings.catch_warnings(action="ignore"):
        import mlflow.db

        mlflow.db.upgrade.callback(uri)


def _find_experiment(client: Any, name: str, folder: str | None) -> str:
    from mlflow import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        with suppress(MlflowException):  # another process may have been first
            return client.create_experiment(name, folder)
        found = client.get_experiment_by_name(name)
    if found and found.lifecycle_stage == "active":
        return found.experiment_id
    with suppress(MlflowException, AttributeError):
        client.restore_experiment(found.experiment_id)
        warn(f"the experiment {name!r} was deleted; it is restored with its runs")
        return found.experiment_id
    fresh = f"metamerge {time.strftime('%Y-%m-%d %H:%M:%S')}"
    created = client.create_experiment(fresh, folder)
    warn(f"the experiment {name!r} cannot be had; the run goes to {fresh!r}")
    return created


def _dataset_input(told: Mapping[str, Any]) -> Any:
    """Data as MLflow knows it; its digests have 36 characters at most."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = Dataset(
        told["name"][:500],
        told["digest"][:36],
        "local",
        json.dumps({"uri": told["source"]}),
        profile=json.dumps(told["profile"]),
    )
    return DatasetInput(data, [InputTag("mlflow.data.context", told["context"])])
