"""What can end a run before its last step, and how it is told: requests to stop, a loss that is no number, overflow
after overflow, a rank that stands still, a second job on the same folder.

Imports nothing that takes long: `hold_stop_signals` has to come before torch is imported.
"""

import datetime
import faulthandler
import fcntl
import math
import os
import platform
import signal
import sys
from pathlib import Path
from typing import IO

STOP_SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1}
STOP_FILE = "STOP"
STOP_REQUESTS = (*STOP_SIGNALS, f"the file {STOP_FILE}")
SPIKE_MEMORY = 0.99  # of the running mean of the loss: about the last hundred steps
DEFAULT_SCALE_POWER = 16  # DeepSpeed's first fp16 loss scale is 2 to this
WATCHDOG_MARGIN_S = 10  # after --timeout: the ranks that wait for the one that stands still speak first


def hold_stop_signals() -> None:
    """Keeps SIGTERM and SIGUSR1 pending from now on, for `stop_requests` to see.

    There is no handler that they could interrupt anything with: neither the import of torch, which takes seconds, nor a
    save; a second signal changes nothing.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS.values())


def stop_requests(folder: Path | None) -> list[bool]:
    """Which of STOP_REQUESTS have come to this process; the file is looked for in `folder`, not at all if None."""
    pending = signal.sigpending()
    asked_by_file = folder is not None and (folder / STOP_FILE).exists()
    return [number in pending for number in STOP_SIGNALS.values()] + [asked_by_file]


class LossWatch:
    """Judges every step by its loss, and by whether fp16 left out its update because a gradient overflowed.

    `mean` is the running mean of the loss that was saved with the checkpoint, if there is one.
    """

    def __init__(self, fp16: dict, spike_factor: float | None, mean: float | None = None):
        self.max_overflows = fp16.get("initial_scale_power", DEFAULT_SCALE_POWER)
        self.min_scale = fp16.get("min_loss_scale", 1)
        self.spike_factor = spike_factor
        self.mean = mean
        self.num_overflows = 0  # in a row

    def fault(self, loss: float, overflowed: bool, loss_scale: float) -> str | None:
        """Why the run cannot go on, or None.

        Each overflow halves the loss scale; when it has gone down from its first value to 1, or to its minimum, a
        smaller scale is no cure.
        """
        self.num_overflows = self.num_overflows + 1 if overflowed else 0
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if overflowed and (self.num_overflows >= self.max_overflows or loss_scale <= self.min_scale):
            return f"the gradients overflowed {self.num_overflows} times in a row, loss scale {loss_scale:g}"
        return None

    def spike(self, loss: float) -> float | None:
        """The running mean of the loss if `loss` is above `spike_factor` times it, else None; then learns `loss`.

        It learns from spikes too: a loss that stays high is one for a hundred steps or so, not for ever.
        """
        before = self.mean
        self.mean = loss if before is None else SPIKE_MEMORY * before + (1 - SPIKE_MEMORY) * loss
        is_spike = self.spike_factor is not None and before is not None and loss > self.spike_factor * before
        return before if is_spike else None


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


def lock_run_folder(folder: Path) -> IO[str]:
    """Keeps every other job out of a run folder for as long as the returned file is open.

    The kernel lets go when this process ends, also by kill -9. Over NFS the lock holds between hosts, unless it was
    mounted with local_lock; where the file system has none this is said. Raises ValueError that names the holder.
    """
    file = open(folder / "run.lock", "a+", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(
            f"--output {folder} is in use by {file.read().strip()}; wait for it, stop it by"
            f" `touch {folder / STOP_FILE}`, or choose another --output"
        ) from None
    except OSError as error:
        print(f"{file.name}: {error.strerror}: see to it that no second job has this --output", file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()} since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}\n")
    file.flush()
    return file
