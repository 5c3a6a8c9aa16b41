"""California housing: 20,640 districts of the 1990 census; and a generated set of its form."""

from __future__ import annotations

import os
import tempfile
import warnings
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

from metamerge.errors import ZooError
from zoo.tasks.task import Task

CALIFORNIA, GENERATED_HOUSING = "california-housing", "generated-housing"
ROWS, FEATURES = 20_640, 8
_PLACE = Path("data") / CALIFORNIA
_FILE = "housing.npz"
_MOST_BYTES = 2**26
_CENTRES = np.array(  # latitude, longitude, share of districts, attraction
    [
        [34.05, -118.25, 0.42, 1.0],
        [37.70, -122.25, 0.26, 1.3],
        [32.75, -117.10, 0.10, 0.8],
        [38.55, -121.45, 0.10, 0.4],
        [36.75, -119.75, 0.12, 0.0],
    ]
)


def load_california(folder: str | os.PathLike[str] | None = None) -> Task:
    """Load California housing as scikit-learn has it, in its order of rows.

    Paper: Pace and Barry, "Sparse Spatial Autoregressions", Statistics & Probability Letters 33,
    1997. What was fetched once is kept in ``./data/california-housing``.

    Args:
        folder: Where it is kept, if not there.

    Returns:
        20,640 rows of 8 features and one number to predict, in 100,000 dollars.

    Raises:
        ZooError: If it can be neither read nor fetched, or the file holds something else.
    """
    from zoo.tasks.arrays import read_arrays  # with pandas, a second of import

    place = Path(folder).expanduser() if folder is not None else _PLACE
    if not (place / _FILE).is_file():
        _fetch(place)
    arrays = read_arrays(place / _FILE, _MOST_BYTES)
    inputs, targets = arrays.get("inputs"), arrays.get("targets")
    if inputs is None or targets is None or inputs.shape != (ROWS, FEATURES):
        raise ZooError(
            f"{place / _FILE}: expected inputs [{ROWS}, {FEATURES}] and targets [{ROWS}]. Remove "
            "the file to have it fetched again."
        )
    return _task(CALIFORNIA, inputs, targets)


def generate_housing() -> Task:
    """Generate a regression in the form of California housing; always the same one.

    Districts lie around five cities. Their values follow from income, with a power law, from the
    distance to the cities, from age and occupancy, and from noise; as in the census they are cut
    off at 5. It is *like* those data in shapes, units and ranges, and is not them: see ``notes``.

    Returns:
        20,640 rows of 8 features and one number to predict.
    """
    rng = np.random.default_rng(1990)
    home = rng.choice(len(_CENTRES), ROWS, p=_CENTRES[:, 2])
    place = _CENTRES[home, :2] + rng.normal(size=(ROWS, 2)) * rng.gamma(2.0, 0.25, (ROWS, 1))
    wealth = rng.normal(size=ROWS)
    income = np.exp(1.2 + 0.2 * _CENTRES[home, 3] + 0.42 * wealth)
    age = np.clip(rng.normal(29, 12.5, ROWS) - 2 * wealth, 1, 52).round()
    rooms = np.exp(1.45 + 0.25 * wealth + rng.normal(0, 0.22, ROWS))
    bedrooms = 1 + rng.gamma(1.2, 0.05, ROWS) + 0.01 * rooms
    people = np.exp(rng.normal(7, 0.7, ROWS)).round() + 3
    occupancy = 1.2 + rng.gamma(4.0, 0.45, ROWS)
    gaps = np.linalg.norm(place[:, None] - _CENTRES[None, :, :2], axis=2)  # [rows, cities]
    pull = (_CENTRES[:, 3] * np.exp(-gaps / 0.4)).sum(1)
    logarithm = (
        -0.52
        + 0.75 * np.log(income)
        + 0.75 * pull
        + 0.004 * (age - 29)
        - 0.16 * np.log(occupancy)
        + 0.10 * np.sin(3 * place[:, 0]) * np.cos(2 * place[:, 1])
        + rng.normal(0, 0.22, ROWS)
    )
    values = np.clip(np.exp(logarithm), 0.15, 5.0)
    columns = (income, age, rooms, bedrooms, people, occupancy, *place.T)
    notes = ("generated in the form of California housing, which it is not",)
    return _task(GENERATED_HOUSING, np.stack(columns, 1), values, notes)


def _task(name: str, inputs: np.ndarray, values: np.ndarray, notes: tuple[str, ...] = ()) -> Task:
    return Task(
        name,
        torch.from_numpy(inputs.astype(np.float32)),
        torch.from_numpy(values.astype(np.float32)).reshape(-1, 1),
        classes=None,
        standardise=True,
        notes=notes,
    )


def _fetch(place: Path) -> None:
    """Fetch the data with scikit-learn and keep them, whole or not at all."""
    from sklearn.datasets import fetch_california_housing  # a second of import

    try:
        with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its second attempt; the error says it all
            bunch = fetch_california_housing(data_home=cache, n_retries=1, delay=0.1)
    except (OSError, ValueError, HTTPException) as error:
        raise ZooError(
            f"load_task({CALIFORNIA!r}): no {place / _FILE}, and scikit-learn could not fetch it "
            f"({error}). Run once with a network: it is then kept in {place}. Or take "
            f"{GENERATED_HOUSING!r}, a generated set of the same form."
        ) from error
    place.mkdir(parents=True, exist_ok=True)
    unfinished = place / f".{_FILE}.{os.getpid()}"
    with open(unfinished, "wb") as file:
        np.savez(file, inputs=bunch.data, targets=bunch.target)
    os.replace(unfinished, place / _FILE)
