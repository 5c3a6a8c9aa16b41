"""Runs in MLflow that tell truthfully how they ended and never cost the caller's work.

Trainers and comparisons write through ``track``. What a run does becomes events, plain records: a
store that answers gets them at once (``store.py``, the one file here that imports mlflow); for one
that does not they are kept beside the run's output and uploaded later, by
``python -m evaluation.tracking --upload``.
"""

from evaluation.tracking.context import track
from evaluation.tracking.data import zoo_datasets
from evaluation.tracking.events import Dataset
from evaluation.tracking.run import Run

__all__ = ["Dataset", "Run", "track", "zoo_datasets"]
