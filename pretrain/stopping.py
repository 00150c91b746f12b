"""Requests to stop a run: SIGTERM, SIGUSR1 and the file STOP.

Imports nothing slow, because `hold_stop_signals` must run before torch is imported.
"""

import signal
from pathlib import Path

STOP_SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1}
STOP_FILE = "STOP"
STOP_REQUESTS = (*STOP_SIGNALS, f"the file {STOP_FILE}")


def hold_stop_signals() -> None:
    """Block SIGTERM and SIGUSR1, so that they stay pending until `stop_requests` looks for them.

    Without a handler, a signal interrupts neither the import of torch nor a save, and a second one changes nothing.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS.values())


def stop_requests(folder: Path | None) -> list[bool]:
    """Whether each of STOP_REQUESTS has reached this process. If `folder` is None, the file is not checked."""
    pending = signal.sigpending()
    has_file = folder is not None and (folder / STOP_FILE).exists()
    return [number in pending for number in STOP_SIGNALS.values()] + [has_file]
