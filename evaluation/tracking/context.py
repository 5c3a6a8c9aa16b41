"""``track``: a run that ends as its body does."""

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from evaluation.tracking.databases import store_address
from evaluation.tracking.events import Dataset, event, without_password
from evaluation.tracking.processes import process_tags
from evaluation.tracking.run import Run

SYSTEM = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"


@contextmanager
def track(
    name: str,
    *,
    options: Mapping[str, Any],
    experiment: str = "metamerge",
    uri: str | None = None,
    tags: Mapping[str, Any] | None = None,
    inputs: Sequence[Dataset] = (),
    resume: str | None = None,
    record: str | Path = "runs/offline",
    system: bool = False,
    enabled: bool = True,
) -> Iterator[Run]:
    """Track the body as one run that ends FINISHED, FAILED or KILLED, as the body does.

    In the body SIGTERM raises ``SystemExit(143)``, unless the program handles it already. Runs of
    this host whose process was killed without a word are marked KILLED when the next one starts.

    Args:
        name: Name of the run.
        options: The whole options record; nested mappings are flattened with dots.
        experiment: Created when missing, restored when deleted.
        uri: Store; by default MLFLOW_TRACKING_URI, else ``mlflow.db`` in the working directory.
        tags: Tags of the run.
        inputs: Data that the run reads.
        resume: Id of a run to go on with; options that differ become tags ``changed.<key>``.
        record: Folder of records of runs whose store does not answer, beside the run's output.
        system: Log load, memory and network of the machine as well, every 10 seconds; the
            environment variable MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING overrules it.
        enabled: False gives a silent run, for all ranks but the first.

    Yields:
        The run.
    """
    address = store_address(uri)
    start = event(
        "start",
        name=name,
        experiment=experiment,
        uri=without_password(address),
        resume=resume,
        context={},
        process=process_tags(),
    )
    run = Run(start, address, Path(record), enabled)
    with _sigterm_raises() if enabled else nullcontext():
        try:
            run.open()
            run.options(options)
            run.tags(tags or {})
            if inputs:
                run.inputs(*inputs)
            with _watching(run, system):
                yield run
            run.close("FINISHED")
        except BaseException as error:
            code = error.code if isinstance(error, SystemExit) else 1
            killed = isinstance(error, (KeyboardInterrupt, GeneratorExit)) or code in (130, 143)
            run.close("KILLED" if killed else "FAILED" if code else "FINISHED", error)
            raise


def _watching(run: Run, system: bool) -> AbstractContextManager:
    """The monitor of the machine, where it is wanted."""
    told = os.environ.get(SYSTEM)
    wanted = system if told is None else told.lower() in ("true", "1")
    return run.watched() if wanted else nullcontext()


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the end short
        raise SystemExit(143)

    main = threading.current_thread() is threading.main_thread()
    ours = main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
