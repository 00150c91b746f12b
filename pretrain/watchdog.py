"""Ending a rank that hangs."""

import faulthandler

WATCHDOG_MARGIN_S = 10  # after --timeout: the ranks that wait for the one that stands still speak first


class Watchdog:
    """Ends this rank if what it is `at` takes longer than a collective may, and prints where each thread of it stands.

    The timer is a thread of C: it also fires where the interpreter hangs, as in a read from a dead file system.
    """

    def __init__(self, timeout_min: float):
        self.seconds = 60 * timeout_min + WATCHDOG_MARGIN_S
        self.place = "the start"

    def at(self, place: str) -> None:
        """Begins to wait anew, for `place` to end."""
        self.place = place
        faulthandler.dump_traceback_later(self.seconds, exit=True)

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
