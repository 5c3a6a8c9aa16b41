"""Runs that no store has seen: ``python -m evaluation.tracking --upload``."""

from dataclasses import dataclass

from rich.console import Console

from evaluation.tracking.events import without_password
from evaluation.tracking.record import records
from evaluation.tracking.store import Store
from evaluation.tracking.uploading import upload
from metamerge.errors import MetaMergeError
from zoo.options import command


@dataclass(frozen=True)
class TrackingOptions:
    """List the records of runs whose store did not answer, and upload them."""

    records: tuple[str, ...] = ("runs",)  # folders to look in, and below
    upload: bool = False  # upload what the store does not have yet; if not, it is only listed
    uri: str | None = None  # store; where each run was to go if not given


def report(options: TrackingOptions) -> None:
    """List records, or upload them.

    Args:
        options: Which, and where to.

    Raises:
        MetaMergeError: If a store does not answer; what it has got is not sent again.
    """
    console, stores = Console(highlight=False, soft_wrap=True), {}
    for record in records(options.records):
        first = record.events()[0]
        key = options.uri or first["uri"], first["experiment"]
        waiting = len(record.events()) - record.uploaded()[0]
        told = f"{first['name']}: {record.folder}"
        if not options.upload:
            console.print(f"{told}: {waiting} events to upload to {key[0]}", markup=False)
            continue
        try:
            store = stores.setdefault(key, Store(*key)) if key not in stores else stores[key]
            run, sent = upload(record, store)
        except Exception as error:
            raise MetaMergeError(
                f"{record.folder}: {without_password(str(error))[:400]}. {waiting} events wait; "
                "name a store that answers with --uri, or try again later."
            ) from error
        console.print(f"{told}: {sent} events sent to run {run} in {key[0]}", markup=False)


def main() -> None:
    """Entry point of ``python -m evaluation.tracking``."""
    command(TrackingOptions, report, prog="python -m evaluation.tracking")


if __name__ == "__main__":
    main()
