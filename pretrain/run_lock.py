"""One job per run folder."""

import datetime
import fcntl
import os
import platform
import sys
from pathlib import Path
from typing import IO

from pretrain.stopping import STOP_FILE


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
