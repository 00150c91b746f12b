"""A short pretraining on one device: does this machine train, and how fast?

    make smoke          or          python -m examples.smoke [--output runs/smoke]

On a GPU it runs `base` in bf16 for 300 steps, on a CPU `tiny` in fp32 for 20 steps. The data are the quick start's
shards, which are made first if they are missing. Prints samples/s, real tokens/s and MFU from the run's metrics.jsonl.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

from tabulate import tabulate

from examples.quickstart import ROOT, prepare_shards
from examples.stages import describe_machine, launch, num_gpus, run_stage


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.smoke", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/smoke"), help="default: %(default)s")
    parser.add_argument(
        "--data", type=Path, default=Path("runs/quickstart"), help="the quick start's folder: %(default)s"
    )
    args = parser.parse_args(argv)
    on_gpu = num_gpus() > 0
    model, ds_config = ("base", "smoke_single_gpu.json") if on_gpu else ("tiny", "smoke_cpu.json")
    print(f"Smoke test of {model} on {describe_machine()}" + ("" if on_gpu else ": the CPU stands in for a GPU"))
    stage = partial(run_stage, time.monotonic())
    prepare_shards(stage, args.data)
    command = launch(
        1, "pretrain.train", "--model", model, "--data", args.data / "shards/train",
        "--eval-data", args.data / "shards/heldout", "--deepspeed_config", ROOT / "ds_configs" / ds_config,
        "--output", args.output, "--tensor-parallel", 1,
    )  # fmt: skip
    stage(f"Pretraining {model} on one {'GPU' if on_gpu else 'CPU process'}", command)
    print_speed(args.output / "metrics.jsonl")


def print_speed(metrics_file: Path) -> None:
    """Print losses, and medians over the rows after the first, which includes allocation and the filling of caches."""
    rows = [row for row in map(json.loads, metrics_file.read_text().splitlines()) if row["kind"] == "train"]
    steady = rows[1:] or rows
    names = ("samples_per_s", "tokens_per_s", "step_ms", "mfu", "memory_gib")
    table = [[name, statistics.median(row[name] for row in steady)] for name in names]
    table += [["loss, first", rows[0]["loss"]], ["loss, last", rows[-1]["loss"]]]
    print()
    print(tabulate(table, headers=["smoke test", "value"], floatfmt=",.3f"))


if __name__ == "__main__":
    main()
