"""Requests to stop a run: SIGTERM, SIGUSR1 and the file STOP.

Imports nothing that takes long, because `hold_stop_signals` has to run before torch is imported."""

import signal
from pathlib import Path

STOP_SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1}
STOP_FILE = "STOP"
STOP_REQUESTS = (*STOP_SIGNALS, f"the file {STOP_FILE}")


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
