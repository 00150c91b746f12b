"""The stages of a program: commands that are announced with the elapsed time, and end the program if they fail."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

BIN = Path(sys.executable).parent
# A surrounding batch job may have set these variables, but the stages are not ranks of that job.
LAUNCHERS_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")


def module(name: str, *args: object) -> list[str]:
    """The command `python -m name args...` with this Python."""
    return [sys.executable, "-m", name, *map(str, args)]


def launch(num_ranks: int, name: str, *args: object) -> list[str]:
    """The command `deepspeed --module name args...` on `num_ranks` local ranks, on a free port to avoid clashes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    options = ("--quiet", "--num_accelerators", num_ranks, "--master_port", port)
    return [str(BIN / "deepspeed"), *map(str, options), "--module", name, *map(str, args)]


def num_gpus() -> int:
    return torch.cuda.device_count()


def describe_machine() -> str:
    """One line: the GPUs, or the CPU cores."""
    if num_gpus():
        return f"{num_gpus()} x {torch.cuda.get_device_name(0)}"
    return f"{os.cpu_count()} CPU cores, no GPU"


def run_stage(started: float, title: str, command: list[str], num_ranks: int = 1) -> None:
    """Print a headline with the time since `started` (time.monotonic), then run `command` in this terminal.

    The cores are divided among `num_ranks`. If the command fails, the program ends with the same exit code.
    """
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    print(f"\n=== {minutes:2d}:{seconds:02d}  {title}", flush=True)
    num_threads = max(1, (os.cpu_count() or 1) // num_ranks)
    # DeepSpeed compiles with the environment's ninja and its launcher starts `python`.
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)])
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHERS_VARIABLES}
    result = subprocess.run(command, env={**environment, "PATH": path, "OMP_NUM_THREADS": str(num_threads)})
    if result.returncode:
        print(f"error: the stage {title!r} failed; see the error above. The command was:", file=sys.stderr)
        print(" ".join(command), file=sys.stderr)
        print("Run the same command again to resume: complete stages are reused.", file=sys.stderr)
        sys.exit(result.returncode)
