"""A grid of fine-tunings, several side by side: every learning rate x batch size x number of epochs, each with every
seed, and which setting is best.

    python -m evaluation.grid --learning-rates 5e-5 3e-5 2e-5 --batch-sizes 16 32 --epochs 2 3 --jobs 2 \
        --output runs/rte-grid  --task rte --data-dir glue/RTE --checkpoint runs/mini --seeds 0 1 2

All other options are those of `evaluation.finetune`, which does the work: OUTPUT/rate-5e-05_batch-16_epochs-2/ is a run
of it, whose seeds may run at the same time; OUTPUT/cache keeps what they tokenise, unless --cache names a folder. The
same command again, also after kill -9, goes on where it was. OUTPUT/run.json holds what all runs share, so that rates,
batch sizes, epochs and seeds may be added later, and anything else that changed is refused by name. A setting is chosen
by the median of the first metric over the seeds, after the last epoch (Devlin et al. 2019, A.3: on dev).
"""

import argparse
import itertools
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate
from tqdm import tqdm

from data_prep.cli import run_cli
from data_prep.files import claim_output, read_json
from evaluation import finetune
from evaluation.options import check_numbers
from evaluation.run_folder import (
    RESULTS_FILE,
    mean_and_spread,
    percent,
    read_seeds,
    seed_folder,
    seed_result_file,
    summarize,
)
from pretrain.layout import environment_side_by_side


class Setting(NamedTuple):
    """One point of the grid."""

    learning_rate: float
    batch_size: int
    epochs: int

    @property
    def name(self) -> str:
        return f"rate-{self.learning_rate}_batch-{self.batch_size}_epochs-{self.epochs}"


def main(argv: list[str] | None = None) -> None:
    args, rest = parse_args(argv)
    settings = [Setting(*point) for point in itertools.product(args.learning_rates, args.batch_sizes, args.epochs)]
    runs = [(setting, seed) for setting in settings for seed in args.seeds]
    todo = [run for run in runs if not seed_result_file(args.output / run[0].name, run[1]).exists()]
    setting, seed = (todo or runs)[0]
    part = str(seed_folder(Path(setting.name), seed))
    claim_output(args.output, "evaluation.grid", shared_settings(args, rest, settings), part)
    (args.output / "logs").mkdir(exist_ok=True)
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
        seeds = [row for row in read_seeds(path.parent) if row["seed"] in args.seeds]
        results[setting] = summarize(seeds, {"metrics": read_json(path)["metrics"]})
    print(table(results))


def shared_settings(args: argparse.Namespace, rest: list[str], settings: list[Setting]) -> dict:
    """What run.json has of all the grid's runs alike. Raises ValueError for what any of them would refuse."""
    for setting in settings:
        run = finetune.parse_args(options(args, rest, setting, args.seeds))
        check_numbers(run, num_ranks=1)
    shared = finetune.make_plan(run).settings
    deepspeed = shared.pop("deepspeed_config", None)
    if deepspeed:  # a baseline has none of the three
        del shared["epochs"], shared["batch_size"], deepspeed["train_batch_size"]
        del deepspeed["optimizer"]["params"]["lr"]
        shared["deepspeed_config"] = deepspeed
    return shared


def options(args: argparse.Namespace, rest: list[str], setting: Setting, seeds: list[int]) -> list[str]:
    """The command line of one `evaluation.finetune`."""
    own = ["--output", args.output / setting.name, "--learning-rate", setting.learning_rate]
    own += ["--batch-size", setting.batch_size, "--epochs", setting.epochs, "--seeds", *seeds]
    return [*rest, *map(str, own)]


def fine_tune(args: argparse.Namespace, rest: list[str], setting: Setting, seeds: list[int], number: int) -> None:
    """One `evaluation.finetune`. Raises ValueError or OSError with its last line if it fails."""
    command = [sys.executable, "-m", "evaluation.finetune", *options(args, rest, setting, seeds)]
    log = args.output / "logs" / f"{setting.name}_seed-{'-'.join(map(str, seeds))}.log"
    with open(log, "w", encoding="utf-8") as file:
        environment = environment_side_by_side(number % args.jobs, args.jobs)
        code = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
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
        [setting.learning_rate, setting.batch_size, setting.epochs, percent(result["last"][metric]["median"]),
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
    values = partial(add, nargs="+", action="extend")
    values("--learning-rates", type=float, required=True, metavar="X", help="peak rates of AdamW")
    values("--batch-sizes", type=int, metavar="N", help="examples a step (default 32)")
    values("--epochs", type=int, metavar="N", help="passes over the training set (default 3)")
    values("--seeds", type=int, metavar="N", help="of each setting (default 0 1 2)")
    add("--jobs", type=int, default=1, metavar="N", help="runs side by side; they share cores and GPUs (default 1)")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the runs; empty, missing or this grid's")
    args, rest = parser.parse_known_args(argv)
    # Not as argparse's defaults, which an option given by the user would extend.
    args.batch_sizes, args.epochs, args.seeds = args.batch_sizes or [32], args.epochs or [3], args.seeds or [0, 1, 2]
    for name, values in (("learning-rates", args.learning_rates), ("batch-sizes", args.batch_sizes),
                         ("epochs", args.epochs), ("seeds", args.seeds)):  # fmt: skip
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} {' '.join(map(str, values))}: each value once")
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs}: at least 1 is due")
    given = [word.partition("=")[0] for word in rest]
    for flag in ("--learning-rate", "--batch-size", "--predict"):
        if flag in given:
            raise ValueError(
                f"{flag} is not the grid's: give --learning-rates and --batch-sizes, and predict from a run"
            )
    if "--cache" not in given:
        rest += ["--cache", str(args.output / "cache")]
    return args, rest


if __name__ == "__main__":
    run_cli(main)
