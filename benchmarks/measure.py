"""What every benchmark shares: timing in turn, a table of ratios, and a result file with machine, versions and date.

A single time means little on a busy machine. Competitors therefore run in turn (A B C A B C), and the medians of their
times are compared.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from tabulate import tabulate

RESULTS = Path(__file__).parent / "results"
VERSIONS = ("torch", "deepspeed", "megatron-core", "transformers", "numpy")


def in_turn(competitors: dict[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Calls the competitors in turn, `warm_up` + `repeats` times; returns the seconds of the calls after warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(warm_up + repeats):
        for name, run in competitors.items():
            start = time.perf_counter()
            run()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compared(seconds: dict[str, list[float]], base: str) -> list[dict]:
    """One row per competitor: its median in milliseconds, its ratio to the median of `base`, and its range."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        {
            "what": name,
            "median ms": 1e3 * medians[name],
            f"time / {base}": medians[name] / medians[base],
            "span": f"{1e3 * min(times):.0f}-{1e3 * max(times):.0f}",
        }
        for name, times in seconds.items()
    ]


def copy_bandwidth(device: torch.device, num_bytes: int = 2**28) -> float:
    """Bytes read and written per second by a large copy, the upper bound for work that is limited by memory."""
    source = torch.ones(num_bytes // 4, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(16):
        start = time.perf_counter()
        target.copy_(source)[-1].item()
        seconds.append(time.perf_counter() - start)
    return 2 * num_bytes / min(seconds)


def high_water_mark(pid: int | str) -> int:
    """Peak resident memory of a process so far, in bytes; 0 if the process has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def describe_machine() -> dict:
    """Processor or GPU, cores, versions and date: the head of every result file."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or _processor(),
        "num_cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def report(topic: str, tables: dict[str, list[dict]], save: bool) -> None:
    """Prints the tables and, with `save`, writes `results/<topic>-<machine>.json`."""
    machine = describe_machine()
    print(f"{topic} on {machine['device']}, {machine['num_cores']} cores, torch {machine['versions']['torch']}")
    for title, rows in tables.items():
        print(f"\n{title}\n{tabulate(rows, headers='keys', floatfmt='.4g')}")
    if save:
        name = f"{machine['device']}-{machine['num_cores']}-cores".lower().replace(" ", "-").replace("/", "-")
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{topic}-{name}.json"
        path.write_text(json.dumps({**machine, "tables": tables}, indent=2) + "\n", encoding="utf-8")
        print(f"\nWritten: {path}")


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=5, help="timed runs of each competitor (default 5)")
    made.add_argument("--save", action="store_true", help="write benchmarks/results/TOPIC-MACHINE.json")
    return made
