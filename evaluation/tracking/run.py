"""A run: what it does goes to its store or, where that fails, to a record on disk."""

import copy
import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from evaluation.tracking.events import (
    HANDLE,
    Dataset,
    Event,
    dataset_records,
    event,
    points,
    split_name,
    texts,
    warn,
)
from evaluation.tracking.processes import process_tags
from evaluation.tracking.record import EVENTS, Record

if TYPE_CHECKING:  # torch takes seconds to import, and only models need it
    from torch import Tensor, nn

    from metamerge.weights import Weights

LARGE = ("artifact", "model")  # their store may fail while that of numbers is well


class Run:
    """One run, from ``track``; silent when not enabled.

    Attributes:
        id: Id of the run in its store, or of its record (``event-...``) where the store did not
            answer; both can be resumed. None when not enabled.
        unsent: How many calls of each kind did not reach the store.
    """

    def __init__(self, start: Event, address: str, folder: Path, enabled: bool) -> None:
        self.id: str | None = None
        self.unsent: Counter[str] = Counter()
        self._start, self._address, self._folder = start, address, folder
        self._enabled = enabled
        self._process = os.getpid()
        self._store: Any = None
        self._record: Record | None = None
        self._inputs: list[dict[str, Any]] = []
        self._children = 0

    # ------------------------------------------------------------------------------ what is logged

    def options(self, values: Mapping[str, Any]) -> None:
        """Log options; nested mappings are flattened with dots."""
        self._do(lambda: event("options", values=texts(values)))

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags of the run."""
        self._do(lambda: event("tags", values=texts(values)))

    def metrics(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers, or tensors and arrays of one number.

        What is not finite becomes ``<name>_nonfinite = 1``. A resumed run skips the steps that a
        curve already has; values without a step are always logged.
        """
        resumed = bool(self._start["resume"])
        self._do(lambda: event("metrics", values=points(values, step), resumed=resumed))

    def inputs(self, *datasets: Dataset) -> None:
        """Log data that the run has read; children that follow name it as theirs as well."""
        self._inputs += dataset_records(datasets)
        self._do(lambda: event("inputs", inputs=dataset_records(datasets)))

    def text(self, text: str, filename: str) -> None:
        """Store ``text`` as the artifact ``filename``."""
        self._file(filename, lambda path: path.write_text(text, encoding="utf-8"))

    def figure(self, figure: Any, filename: str) -> None:
        """Store a matplotlib (.png, .svg, .pdf) or plotly (.html) figure as ``filename``."""
        write = getattr(figure, "savefig", None) or figure.write_html
        self._file(filename, write)

    def artifact(self, path: str | Path) -> None:
        """Store a file, or a folder under its own name."""

        def make() -> Event:
            found = Path(path).resolve(strict=True)
            return event("artifact", path=str(found), into=None)

        self._do(make, "artifact")

    def child(
        self,
        name: str,
        *,
        options: Mapping = {},
        metrics: Mapping = {},
        tags: Mapping = {},
        seconds: float = 0,
    ) -> str | None:
        """Write a whole, finished run below this one.

        Its option ``child`` is its number and name: MLflow's parallel coordinates show nine letters
        of a text, and mix up those that begin alike.

        Args:
            name: Its name.
            options: Its options.
            metrics: Its numbers. MLflow compares runs by the names that they share.
            tags: Its tags.
            seconds: How long its work took, which has just ended.

        Returns:
            Its id, in the store or in the record; None when not enabled.
        """
        self._children += 1
        numbered = {"child": f"{self._children:02d} {name}", **options}
        return self._do(
            lambda: event(
                "child",
                name=name,
                options=texts(numbered),
                metrics=points(metrics),
                tags=texts(tags),
                inputs=self._inputs,
                seconds=seconds,
                context={**self._start["context"], **process_tags()},
            )
        )

    def network(
        self,
        network: "nn.Module",
        weights: "Weights",
        example: "Tensor",
        *,
        name: str = "m",
        about: Mapping[str, Any] = {},
        program: Mapping[str, Any] | None = None,
        of: str | None = None,
        registered: str | None = None,
        alias: str | None = None,
    ) -> str | None:
        """Log a network as a model that loads back, ``runs:/<id>/<name>``.

        ``mlflow.pytorch.load_model`` gives the exported network, for batches of any size, and
        ``metamerge.merge`` takes the address among its checkpoints: safetensors lie beside it.

        Args:
            network: A module of the architecture; it is not changed.
            weights: What it shall carry, such as ``merge(...).weights``.
            example: Inputs ``[b, ...]`` to export it with.
            name: Name of the model within the run.
            about: What a reader wants to know, such as ``merge(...).report``; JSON.
            program: The traced network, ``merge(...).program.to_json()``, so that the checkpoint
                can be merged without the module.
            of: A child that the model belongs to; this run if not given.
            registered: Name in the registry, where it becomes a new version.
            alias: Alias of that version, such as ``champion``: ``models:/<registered>@<alias>``.

        Returns:
            Id of the model, ``models:/<id>``; None where it did not reach the store.
        """
        named = {"name": name, "of": of, "registered": registered, "alias": alias}

        def write(folder: Path) -> None:
            from evaluation.tracking.store import write_model
            from metamerge.checkpoints import save_checkpoint

            carrier = _carrying(network, weights)
            kept = save_checkpoint(
                weights, folder / "kept", metadata={"about": dict(about)}, program=program
            )
            write_model(folder / name, kept, carrier, example)

        return self._model(write, named, about)

    def merger(
        self,
        folder: str | Path,
        *,
        name: str = "m",
        registered: str | None = None,
        alias: str | None = None,
    ) -> str | None:
        """Log a trained merger as a model: ``merge(..., merger="runs:/<id>/<name>")``.

        Args:
            folder: Where ``save_merger`` has put it.
            name: Name of the model within the run.
            registered: Name in the registry, where it becomes a new version.
            alias: Alias of that version: ``models:/<registered>@<alias>``.

        Returns:
            Id of the model, ``models:/<id>``; None where it did not reach the store.
        """
        named = {"name": name, "of": None, "registered": registered, "alias": alias}

        def write(place: Path) -> None:
            from evaluation.tracking.store import write_model

            write_model(place / name, Path(folder), None, None)

        return self._model(write, named, {})

    # ------------------------------------------------------------------------------ where it goes

    def _file(self, filename: str, write: Callable[[Path], Any]) -> None:
        with TemporaryDirectory() as folder:

            def make() -> Event:
                into, name = split_name(filename)
                write(Path(folder, name))
                return event("artifact", path=str(Path(folder, name)), into=into)

            self._do(make, "artifact")

    def _model(
        self, write: Callable[[Path], None], named: dict[str, Any], about: Mapping[str, Any]
    ) -> str | None:
        with TemporaryDirectory() as folder:

            def make() -> Event:
                write(Path(folder))
                params = {k: t[:250] for k, t in texts(about).items() if len(k) <= 250}
                path = str(Path(folder, named["name"]))
                return event("model", path=path, params=params, **named)

            return self._do(make, "model")

    def _do(self, make: Callable[[], Event], kind: str = "") -> str | None:
        """Make an event and send it; whatever fails costs a warning, never the caller's work."""
        if not self._enabled:
            return None
        try:
            happened = make()
        except Exception as failure:
            warn(f"{kind or 'a call'} not logged", failure)
            self.unsent[kind] += 1
            return None
        if self._store:
            try:
                return self._store.apply(self.id, happened)
            except Exception as failure:
                if self._is_refused(failure, happened):
                    return None
                self._fall_back(failure, happened)
        return self._keep(happened)

    def _is_refused(self, failure: Exception, happened: Event) -> bool:
        from evaluation.tracking.store import concerns_one_call

        refused = concerns_one_call(failure)
        if refused:
            warn(f"{happened['do']} not logged", failure)
            self.unsent[happened["do"]] += 1
        return refused

    def _fall_back(self, failure: Exception, happened: Event) -> None:
        """From here on everything is kept in the record, numbers alone not where files failed."""
        if happened["do"] not in LARGE:
            self._store = None
        if self._record is None:
            warn(
                f"{happened['do']} not logged, the work goes on and its record is kept in "
                f"{self._folder}; `python -m evaluation.tracking --records {self._folder} "
                "--upload` sends it to a store that answers",
                failure,
            )

    def _keep(self, happened: Event) -> str | None:
        """Add an event to the record."""
        self.unsent[happened["do"]] += 1
        try:
            if self._record is None:
                self._record = self._record_of_this_run()
            if happened is not self._start:
                self._record.add(happened)
        except Exception as failure:
            warn(f"{happened['do']} is lost: it could not be kept either", failure)
            self._enabled = False
        return happened["id"]

    def _record_of_this_run(self) -> Record:
        """The record that a resumed run has already, or a new one that begins with its start."""
        resume = self._start["resume"] or ""
        known = Record(self._folder / resume)
        there = resume.startswith(HANDLE) and (known.folder / EVENTS).exists()
        record = known if there else Record(self._folder / self._start["id"])
        record.add(self._start)
        return record

    # ------------------------------------------------------------------------------ start and end

    def open(self) -> None:
        """Find the store and create the run, or take it up again."""
        if not self._enabled:
            return
        try:
            from evaluation.tracking.store import Store, context_tags
            from evaluation.tracking.uploading import upload

            self._start["context"] = context_tags()
            store = Store(self._address, self._start["experiment"])
            store.reconcile()
            earlier = Record(self._folder / (self._start["resume"] or "."))
            if (earlier.folder / EVENTS).exists():
                upload(earlier, store)
            self.id = store.start(self._start)
            self._store = store
        except Exception as failure:
            self._fall_back(failure, self._start)
            resume = self._start["resume"]
            self.id = resume or self._start["id"]
            self._keep(self._start)

    def watched(self) -> AbstractContextManager:
        """Log load, memory and network of this machine while the body runs."""
        return self._store.system_metrics(self.id) if self._store else nullcontext()

    def close(self, status: str, error: BaseException | None = None) -> None:
        """Tell how the run ended; a store that failed may be back and gets the whole record."""
        if not self._enabled or os.getpid() != self._process:  # a forked worker owns no run
            return
        tags = {"error": f"{type(error).__name__}: {error}"} if status == "FAILED" else {}
        end = event("end", status=status, tags=texts(tags))
        apart = self._record  # files whose store failed, while that of numbers was well
        self._do(lambda: end)
        if self._record is None:
            return
        if apart and self._store:
            self._keep(end)
        with suppress(Exception):  # that it failed was told before
            from evaluation.tracking.store import Store
            from evaluation.tracking.uploading import upload

            store = self._store or Store(self._address, self._start["experiment"])
            upload(self._record, store)
            warn("the store answers again and has got the whole record")


def _carrying(network: "nn.Module", weights: "Weights") -> "nn.Module":
    carrier = copy.deepcopy(network)
    carrier.load_state_dict(weights)
    return carrier
