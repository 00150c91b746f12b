"""A grid of fine-tunings, several side by side: every learning rate x batch size x number of epochs, each with every
seed, and which setting is best.

    python -m evaluation.grid --learning-rates 5e-5 3e-5 2e-5 --batch-sizes 16 32 --epochs 2 3 --jobs 2 \
        --output runs/rte-grid  --task rte --data-dir glue/RTE --checkpoint runs/mini --seeds 0 1 2

All other options are those of `evaluation.finetune`, which does the work: OUTPUT/rate-5e-05_batch-16_epochs-2/ is a run
of it, whose seeds may run at the same time; OUTPUT/cache keeps what they tokenise, unless --cache names a folder. The
same command again, also after kill -9, goes on where it was. A setting is chosen by the median of the first metric over
the seeds, after the last epoch (Devlin et al. 2019, A.3: on dev).
"""

import argparse
import itertools
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate
from tqdm import tqdm

from data_prep.cli import read_json, run_cli
from evaluation.results import RESULTS_FILE, mean_and_spread, percent, seed_result_file
from pretrain.layout import environment_side_by_side


class Setting(NamedTuple):
    """One point of the grid."""

    learning_rate: float
    batch_size: int
    epochs: int

    @property
    def name(self) -> str:
        return f"rate-{self.learning_rate:g}_batch-{self.batch_size}_epochs-{self.epochs}"


def main(argv: list[str] | None = None) -> None:
    args, rest = parse_args(argv)
    settings = [Setting(*point) for point in itertools.product(args.learning_rates, args.batch_sizes, args.epochs)]
    runs = [(setting, seed) for setting in settings for seed in args.seeds]
    (args.output / "logs").mkdir(parents=True, exist_ok=True)
    todo = [run for run in runs if not seed_result_file(args.output / run[0].name, run[1]).exists()]
    if len(todo) < len(runs):
        print(f"finished before and kept: {len(runs) - len(todo)} of {len(runs)} runs")
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(fine_tune, args, rest, setting, [seed], n) for n, (setting, seed) in enumerate(todo)]
        try:
            for job in tqdm(as_completed(jobs), "grid", len(jobs), unit="run"):
                job.result()
        finally:
            for job in jobs:
                job.cancel()  # those that have not begun
    results = {}
    for setting in settings:
        path = args.output / setting.name / RESULTS_FILE
        # Of two seeds that end at the same moment the one that writes last may not have seen the other.
        if not path.exists() or not set(args.seeds) <= {row["seed"] for row in read_json(path)["seeds"]}:
            fine_tune(args, rest, setting, args.seeds, 0)
        results[setting] = read_json(path)
    print(table(results))


def fine_tune(args: argparse.Namespace, rest: list[str], setting: Setting, seeds: list[int], number: int) -> None:
    """One `evaluation.finetune`. Raises ValueError or OSError with its last line if it fails."""
    command = [sys.executable, "-m", "evaluation.finetune", *rest, "--output", args.output / setting.name]
    command += ["--learning-rate", setting.learning_rate, "--batch-size", setting.batch_size]
    command += ["--epochs", setting.epochs, "--seeds", *seeds]
    log = args.output / "logs" / f"{setting.name}_seed-{'-'.join(map(str, seeds))}.log"
    with open(log, "w", encoding="utf-8") as file:
        environment = environment_side_by_side(number % args.jobs, args.jobs)
        code = subprocess.run(list(map(str, command)), stdout=file, stderr=file, env=environment).returncode
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"]
        kind = ValueError if code == 2 else OSError
        raise kind(
            f"{setting.name}, seed {', '.join(map(str, seeds))}: {lines[-1].removeprefix('error: ')} (all: {log})"
        )


def table(results: dict[Setting, dict]) -> str:
    """A row a setting, the best by its median first; scores of the first metric, in percent."""
    metric = next(iter(results.values()))["metrics"][0]

    def median(result: dict) -> float:
        value = result["last"][metric]["median"]
        return -math.inf if value is None else value

    rows = [
        [f"{setting.learning_rate:g}", setting.batch_size, setting.epochs, percent(result["last"][metric]["median"]),
         mean_and_spread(result["last"][metric]), percent(result["last"][metric]["max"]),
         mean_and_spread(result["best"][metric])]
        for setting, result in sorted(results.items(), key=lambda pair: -median(pair[1]))
    ]  # fmt: skip
    headers = ["learning rate", "batch", "epochs", f"{metric}: median", "mean ± std", "best seed", "at the best epochs"]
    return tabulate(rows, headers, disable_numparse=True, stralign="right")


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The grid's own options, and the rest, for `evaluation.finetune`."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.grid",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --learning-rate is another option
    )
    add = parser.add_argument
    add("--learning-rates", nargs="+", type=float, required=True, metavar="X", help="peak rates of AdamW")
    add("--batch-sizes", nargs="+", type=int, default=[32], metavar="N", help="examples a step (default 32)")
    add("--epochs", nargs="+", type=int, default=[3], metavar="N", help="passes over the training set (default 3)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="of each setting (default 0 1 2)")
    add("--jobs", type=int, default=1, metavar="N", help="runs side by side; they share cores and GPUs (default 1)")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the runs; empty, missing or this grid's")
    args, rest = parser.parse_known_args(argv)
    for name, values in (("learning-rates", args.learning_rates), ("batch-sizes", args.batch_sizes),
                         ("epochs", args.epochs), ("seeds", args.seeds)):  # fmt: skip
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} {' '.join(f'{value:g}' for value in values)}: each value once")
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs}: at least 1 is due")
    for flag in ("--learning-rate", "--batch-size", "--predict"):
        if flag in rest:
            raise ValueError(
                f"{flag} is not the grid's: give --learning-rates and --batch-sizes, and predict from a run"
            )
    if not any(flag.partition("=")[0] == "--cache" for flag in rest):
        rest += ["--cache", str(args.output / "cache")]
    return args, rest


if __name__ == "__main__":
    run_cli(main)
