"""Runs in MLflow that tell truthfully how they ended and never cost the caller's work.

Trainers and comparisons write their runs through ``track``. MLflow is imported on first use, as it
takes a second, and in no other file. A store that fails means one warning and a silent run.
"""

import hashlib
import logging
import math
import os
import re
import shutil
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

ENVIRONMENT = {  # what the user's own environment sets wins
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
}
CONNECT_TIMEOUT = {"sqlite": "timeout", "postgresql": "connect_timeout", "mysql": "connect_timeout"}
ADVICE = ", the work goes on untracked; point MLFLOW_TRACKING_URI to a store that answers"


class Run:
    """One run in the store, from ``track``; silent when not live, or once the store has failed.

    Attributes:
        id: The run's id, None where the store has no such run.
        unsent: How many calls of each kind did not reach the store.
    """

    def __init__(self, live: bool) -> None:
        self.id: str | None = None
        self.unsent: Counter[str] = Counter()
        self._live, self._process = live, os.getpid()
        self._client: Any = None
        self._experiment = ""
        self._resumed: set[str] = set()  # metrics that were there before the run was resumed
        self._last_step: dict[str, int] = {}  # and where their curves ended

    def metrics(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers, or tensors and arrays of one number.

        What is not finite becomes ``<name>_nonfinite = 1``. A resumed run skips the steps that a
        curve already has; values without a step are always logged.
        """
        self._attempt("metrics", lambda: self._send(self.id, self._unseen(_points(values, step))))

    def text(self, text: str, filename: str) -> None:
        """Store ``text`` as the artifact ``filename``."""
        self._attempt("artifact", lambda: self._client.log_text(self.id, text, filename))

    def figure(self, figure: Any, filename: str) -> None:
        """Store a matplotlib (.png, .svg, .pdf) or plotly (.html) figure as ``filename``."""
        self._attempt("artifact", lambda: self._client.log_figure(self.id, figure, filename))

    def artifact(self, path: str | Path) -> None:
        """Store a file, or a folder under its own name."""
        path = Path(path).resolve()
        log, inside = ("log_artifacts", path.name) if path.is_dir() else ("log_artifact", None)
        self._attempt("artifact", lambda: getattr(self._client, log)(self.id, str(path), inside))

    def child(
        self, name: str, *, options: Mapping = {}, metrics: Mapping = {}, tags: Mapping = {}
    ) -> str | None:
        """Write a whole, finished run below this one and return its id (None: not written)."""

        def write() -> str:
            above = {"mlflow.parentRunId": self.id}
            child = self._client.create_run(self._experiment, None, above, name[:250]).info.run_id
            status = "FAILED"
            try:
                self._send(child, _points(metrics), options, tags)
                status = "FINISHED"
            finally:
                self._client.set_terminated(child, status)
            return child

        return self._attempt("child", write)

    def _open(self, name: str, experiment: str, uri: str | None, resume: str | None) -> dict:
        """Create the run, or take it up again; return the parameters that it has."""
        self._client, self._experiment = _connect(uri, experiment)
        from mlflow import MlflowException
        from mlflow.tracking.context.registry import resolve_tags

        found = None
        if resume:
            with suppress(MlflowException):
                found = self._client.get_run(resume)
            if found is None or found.info.lifecycle_stage == "deleted":
                _warn(f"there is no run {resume!r} to resume, a new one is started")
                found = None
        if found is None:
            found = self._client.create_run(self._experiment, None, resolve_tags(), name[:250])
        else:
            self._client.update_run(resume, status="RUNNING")
            for stale in {"error", "unsent"} & set(found.data.tags):
                self._client.delete_tag(resume, stale)
        self.id, self._experiment = found.info.run_id, found.info.experiment_id
        self._resumed = set(found.data.metrics)
        return found.data.params

    def _close(self, status: str, error: BaseException | None = None) -> None:
        """Write how the run ended, also after a failure of the store: it may be back."""
        if self.id is None or os.getpid() != self._process:  # a forked worker does not own the run
            return
        tags = {"error": f"{type(error).__name__}: {error}"} if status == "FAILED" else {}
        tags |= {"unsent": str(dict(self.unsent))} if self.unsent else {}
        try:
            self._client.set_terminated(self.id, status)
            self._send(self.id, tags=tags)
        except Exception as failure:
            if self._live:
                _warn("the end of the run was not logged", failure)

    def _attempt(self, kind: str, action: Callable[[], Any]) -> Any:
        try:
            if self._live:
                return action()
        except Exception as failure:
            code = getattr(failure, "error_code", "")
            one_call = kind == "artifact" or isinstance(failure, (ValueError, TypeError))
            one_call |= code == "INVALID_PARAMETER_VALUE"  # else the store is at fault
            self._live = one_call and self.id is not None
            _warn(f"{kind} not logged{'' if self._live else ADVICE}", failure)
        self.unsent[kind] += 1
        return None

    def _unseen(self, points: list[tuple]) -> list[tuple]:
        for key in {key for key, _, _ in points} & self._resumed - set(self._last_step):
            history = self._client.get_metric_history(self.id, key)
            self._last_step[key] = max((metric.step for metric in history), default=-1)
        return [p for p in points if p[2] is None or p[2] > self._last_step.get(p[0], -math.inf)]

    def _send(self, run: str, points=(), options: Mapping = {}, tags: Mapping = {}, known=None):
        """Log in batches; an option that the run knows with another value becomes a tag."""
        from mlflow.entities import Metric, Param, RunTag

        now, known = int(time.time() * 1000), known or {}
        texts = {k: self._fit(run, k, str(v), 6000) for k, v in _flatten(options).items()}
        labels = {f"changed.{k}": text for k, text in texts.items() if known.get(k, text) != text}
        labels |= {k: self._fit(run, k, str(v), 8000) for k, v in _flatten(tags).items()}
        metrics = [Metric(key, value, now, step or 0) for key, value, step in points]
        params = [Param(key, text) for key, text in texts.items() if key not in known]
        labels = [RunTag(key, text) for key, text in labels.items()]
        for at in range(0, max(len(metrics), len(params), len(labels)), 100):
            batch = (kind[at : at + 100] for kind in (metrics, params, labels))
            self._client.log_batch(run, *batch, synchronous=True)

    def _fit(self, run: str, key: str, text: str, limit: int) -> str:
        """Cut ``text`` to what the store takes; the whole becomes an artifact."""
        text = text.encode(errors="replace").decode()
        if len(text) <= limit:
            return text
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        filename = f"long/{key.replace('/', '_')[:100]}-{digest}.txt"
        self._client.log_text(run, text, filename)
        return f"{text[: limit - 200]} ... (whole: artifact {filename})"


@contextmanager
def track(
    name: str,
    *,
    options: Mapping[str, Any],
    experiment: str = "metamerge",
    uri: str | None = None,
    tags: Mapping[str, Any] | None = None,
    resume: str | None = None,
    enabled: bool = True,
) -> Iterator[Run]:
    """Track the body as one run that ends FINISHED, FAILED or KILLED, as the body does.

    In the body SIGTERM raises ``SystemExit(143)``, unless the program handles it already.

    Args:
        name: Name of the run.
        options: The whole options record; nested mappings are flattened with dots.
        experiment: Created when missing, restored when deleted.
        uri: Store; by default MLFLOW_TRACKING_URI, else ``mlflow.db`` in the working directory.
        tags: Tags of the run.
        resume: Id of a run to go on with; options that differ become tags ``changed.<key>``.
        enabled: False gives a silent run, for all ranks but the first.

    Yields:
        The run.
    """
    run = Run(live=enabled)
    with _sigterm_raises() if enabled else nullcontext():
        try:
            known = run._attempt("run", lambda: run._open(name, experiment, uri, resume))
            run._attempt("options", lambda: run._send(run.id, (), options, tags or {}, known))
            yield run
            run._close("FINISHED")
        except BaseException as error:
            code = error.code if isinstance(error, SystemExit) else 1
            killed = isinstance(error, (KeyboardInterrupt, GeneratorExit)) or code in (130, 143)
            run._close("KILLED" if killed else "FAILED" if code else "FINISHED", error)
            raise


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


def _connect(uri: str | None, experiment: str) -> tuple[Any, str]:
    """Return a client and the experiment's id; a database that is down fails within seconds.

    MLflow's first migration survives neither a second process nor a kill: for a file it runs under
    a lock and in a folder of its own. MLflow itself would try for minutes to reach a database.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    with warnings.catch_warnings(action="ignore"):
        import mlflow.db
    from sqlalchemy import NullPool, create_engine, make_url

    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or _sqlite(Path.cwd() / "mlflow.db")
    dialect = re.split(r"\W", uri)[0]
    database = make_url(uri).database if dialect == "sqlite" else None
    if not database or database == ":memory:":
        file, folder, lock = None, None, nullcontext()
    else:
        file = Path(database).absolute()
        folder = (file.parent / "mlruns" / re.sub(r"\W", "_", experiment)[:100]).as_uri()
        file.parent.mkdir(parents=True, exist_ok=True)
        uri, lock = _sqlite(file), FileLock(f"{file}.lock", timeout=60)
    with lock:
        if file and not file.exists():
            fresh = Path(f"{file}.new")
            shutil.rmtree(fresh, ignore_errors=True)
            with warnings.catch_warnings(action="ignore"):
                mlflow.db.upgrade.callback(_sqlite(fresh / file.name))
            os.replace(fresh / file.name, file)
            shutil.rmtree(fresh)
        if option := CONNECT_TIMEOUT.get(dialect):
            engine = create_engine(uri, poolclass=NullPool, connect_args={option: 5})
            with engine.connect() as connection:
                connection.exec_driver_sql("SELECT 1 FROM sqlite_master" if file else "SELECT 1")
        client = mlflow.MlflowClient(uri)
        return client, _find_experiment(client, experiment, folder)


def _sqlite(file: Path) -> str:
    return "sqlite:///" + re.sub("[%?]", lambda sign: f"%{ord(sign[0]):02X}", str(file))


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
        _warn(f"the experiment {name!r} was deleted; it is restored with its runs")
        return found.experiment_id
    fresh = f"metamerge {time.strftime('%Y-%m-%d %H:%M:%S')}"
    created = client.create_experiment(fresh, folder)
    _warn(f"the experiment {name!r} cannot be had; the run goes to {fresh!r}")
    return created


def _flatten(record: Mapping, prefix: str = "") -> dict[str, Any]:
    """Join nested keys with dots, into names that the store takes, no two of them equal."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        nested = isinstance(value, Mapping) and value
        leaves = _flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
        for name, leaf in leaves.items():
            parts = re.sub(r"[^/\w.\- :]", "_", name).split("/")
            name = "/".join(part for part in parts if part.strip("."))[:220] or "_"
            while name in flat:
                name += "_"
            flat[name] = leaf
    return flat


def _points(values: Mapping[str, Any], step: int | None = None) -> list[tuple]:
    """Return name, finite value and step of each metric."""
    points = []
    for key, value in _flatten(values).items():
        try:
            number = float(value.item() if hasattr(value, "item") else value)
        except OverflowError:
            number = math.inf
        except (TypeError, ValueError, RuntimeError):
            _warn(f"metric {key!r} not logged: {type(value).__name__} is not one number")
            continue
        point = (key, number) if math.isfinite(number) else (f"{key}_nonfinite", 1.0)
        points.append((*point, None if step is None else int(step)))
    return points


def _warn(message: str, error: Exception | None = None) -> None:
    reason = f" ({type(error).__name__}: {error}".splitlines()[0][:400] + ")" if error else ""
    reason = re.sub(r"//[^/@\s]*@", "//", reason)  # no passwords
    warnings.warn(f"tracking: {message}{reason}.", RuntimeWarning, stacklevel=2)
