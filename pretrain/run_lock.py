"""One process group per run folder at a time."""

import datetime
import fcntl
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.stopping import STOP_FILE


@contextmanager
def locked_run_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a run folder. Raises ValueError, naming the holder, if another run has locked it.

    The kernel releases the lock when this process ends, even after kill -9. Over NFS it also holds between hosts,
    unless the file system is mounted with local_lock. A file system without locks only causes a warning on stderr.
    """
    with open(folder / "run.lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"--output {folder} is in use by {file.read().strip()}; wait for it, stop it by"
                f" `touch {folder / STOP_FILE}`, or choose another --output"
            ) from None
        except OSError as error:
            print(
                f"{file.name}: cannot be locked ({error.strerror}); make sure that no other run uses this --output",
                file=sys.stderr,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}\n")
        file.flush()
        yield
