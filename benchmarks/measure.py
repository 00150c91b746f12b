"""What every benchmark shares: runs in turn, a table of ratios, and a result file that says machine, versions and date.

The machine may be busy: a single time means nothing. Competitors therefore run in turn, A B C A B C, and what is
compared is the median of each.
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
    """Seconds of each call of each competitor, called in turn `repeats` times after `warm_up` rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(warm_up + repeats):
        for name, run in competitors.items():
            start = time.perf_counter()
            run()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compared(seconds: dict[str, list[float]], base: str) -> list[dict]:
    """Rows: competitor, median milliseconds, the ratio of its median to that of `base`, and the span of its times."""
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
    """Bytes/s, read and written, of a large copy: what moves bytes and computes little can not be faster."""
    source = torch.ones(num_bytes // 4, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(16):
        start = time.perf_counter()
        target.copy_(source)[-1].item()
        seconds.append(time.perf_counter() - start)
    return 2 * num_bytes / min(seconds)


def high_water_mark(pid: int | str) -> int:
    """Bytes that the process held at most so far; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def describe_machine() -> dict:
    """Processor or GPU, cores, versions and date, as they stand in every result file."""
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
    """Print the tables and, if asked, write `results/<topic>-<machine>.json`."""
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
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=5, help="times that each competitor runs (default 5)")
    made.add_argument("--save", action="store_true", help="write benchmarks/results/TOPIC-MACHINE.json")
    return made
