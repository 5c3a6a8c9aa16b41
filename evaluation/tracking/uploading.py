"""Records go to their store: every event once, in order, with the time that it happened at."""

from evaluation.tracking.events import warn
from evaluation.tracking.record import Record
from evaluation.tracking.store import Store, concerns_one_call


def upload(record: Record, store: Store) -> tuple[str, int]:
    """Send what the store does not have yet.

    Args:
        record: The record. One that its process still writes to is sent as far as it goes.
        store: Where to.

    Returns:
        Id of the run, and how many events were sent.
    """
    with record.lock():
        done, run = record.uploaded()
        record.close_if_gone()
        events = record.events()
        for number, happened in enumerate(events[done:], done + 1):
            if happened["do"] == "start":
                run = store.start(happened, again=True)
            else:
                try:
                    store.apply(run, happened, again=True)
                except Exception as failure:
                    if not concerns_one_call(failure):
                        raise
                    warn(f"{happened['do']} not logged", failure)
            record.mark(number, run)
    return run, len(events) - done
