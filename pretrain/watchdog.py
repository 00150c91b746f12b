"""How a rank ends on a fault: wrong input, a loss that is not finite, another rank's death, or a hang.

All ranks of a run read the same input and see the same loss, so they fail together, and one of them reports it.
What Slurm does when a node dies is in docs/cluster.md.
"""

import faulthandler
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pretrain.layout import Layout, is_about_another_rank

MARGIN_S = 10  # seconds after a collective's timeout, so that waiting ranks report a hanging one before it ends


@contextmanager
def one_report_per_host(local_rank: int) -> Iterator[None]:
    """Only the first rank of each host reports a ValueError or OSError; the others exit with code 2."""
    try:
        yield
    except (ValueError, OSError):
        if local_rank == 0:
            raise
        sys.exit(2)


class Watchdog:
    """Prints all threads' stacks and ends this rank if its current work takes longer than a collective may.

    The timer is a C thread, so it also fires if the interpreter hangs, for example in a read from a dead file system.
    """

    def __init__(self, timeout_min: float, place: str = "the start"):
        self.seconds = 60 * timeout_min + MARGIN_S
        self.place = place

    def at(self, place: str) -> None:
        """Restart the timer for the work named `place`."""
        self.place = place
        faulthandler.dump_traceback_later(self.seconds, exit=True)

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def watch_rank(layout: Layout, timeout_min: float = 10, place: str = "the start") -> Iterator[Watchdog]:
    """Run a rank under a Watchdog, whose timer starts with the first call of `at`.

    A FloatingPointError, which all ranks raise together, becomes one line on stderr and exit code 1. A RuntimeError of
    a collective gets a note: which rank reports it, what it was doing, and which ranks no longer answer.
    """
    try:
        with Watchdog(timeout_min, place) as watchdog:
            yield watchdog
    except FloatingPointError as error:
        if layout.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if is_about_another_rank(error):
            error.add_note(
                f"rank {layout.rank} on {platform.node()}, in {watchdog.place}: another rank died, or did not answer"
                f" for {timeout_min:g} minutes. Ranks that no longer answer: {layout.silent_ranks() or 'none'}"
            )
        raise
