"""CLI: a grid of fine-tunings, several at a time: every learning rate x batch size x number of epochs with every seed.

    python -m evaluation.grid --learning-rates 5e-5 3e-5 2e-5 --batch-sizes 16 32 --epochs 2 3 --workers 2 \
        --output runs/rte-grid  --task rte --data-dir glue/RTE --checkpoint runs/mini --seeds 0 1 2

OUTPUT/rate-5e-05_batch-16_epochs-2/ is a run of `evaluation.finetune`, whose seeds may run at the same time. Tokenised
examples are kept in OUTPUT/cache, unless --cache names another folder. OUTPUT/run.json holds the settings that all runs
share. Rates, batch sizes, epochs and seeds can be added later. Any other change is an error that names the setting.
"""

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate
from tqdm import tqdm

from data_prep.cli import at_least, command_line, number, option, parse, run_cli
from data_prep.files import claim_output, read_json
from evaluation.finetune import prepare_run
from evaluation.options import FinetuneOptions, SharedOptions, check_batch_size, require_distinct
from evaluation.run_folder import (
    RESULTS_FILE,
    mean_and_spread,
    percent,
    read_seeds,
    score_rank,
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


@dataclass(frozen=True, kw_only=True)
class GridOptions(SharedOptions):
    """Fine-tune with every learning rate x batch size x number of epochs, each with every seed, and compare them.

    A setting is ranked by the median of the first metric over the seeds, on the dev set after the last epoch (Devlin et
    al. 2019, A.3). Repeating the command resumes the grid, also after kill -9.
    """

    learning_rates: tuple[float, ...] = option(
        "peak learning rates of AdamW", type=number(above=0, below=1), metavar="X"
    )
    batch_sizes: tuple[int, ...] = option("examples per step", default=(32,), type=at_least(1), metavar="N")
    epochs: tuple[int, ...] = option("passes over the training examples", default=(3,), type=at_least(1), metavar="N")
    workers: int = option("runs at a time; they share cores and GPUs", default=1, type=at_least(1))

    def __post_init__(self) -> None:
        super().__post_init__()
        require_distinct("--learning-rates", self.learning_rates)
        require_distinct("--batch-sizes", self.batch_sizes)
        require_distinct("--epochs", self.epochs)

    @property
    def settings(self) -> list[Setting]:
        """All points of the grid."""
        return [Setting(*point) for point in itertools.product(self.learning_rates, self.batch_sizes, self.epochs)]

    def finetune_options(self, setting: Setting, seeds: tuple[int, ...]) -> FinetuneOptions:
        """The options of one of the grid's fine-tunings."""
        shared = {field.name: getattr(self, field.name) for field in fields(SharedOptions)}
        shared |= {"output": self.output / setting.name, "cache": self.cache or self.output / "cache", "seeds": seeds}
        return FinetuneOptions(**shared, **setting._asdict())


def main(argv: list[str] | None = None) -> None:
    options = parse(GridOptions, "evaluation.grid", argv)
    runs = [(setting, seed) for setting in options.settings for seed in options.seeds]
    todo = [run for run in runs if not seed_result_file(options.output / run[0].name, run[1]).exists()]
    setting, seed = (todo or runs)[0]
    claim_output(options.output, "evaluation.grid", shared_settings(options), seed_folder(Path(setting.name), seed))
    (options.output / "logs").mkdir(exist_ok=True)
    if len(todo) < len(runs):
        print(f"already finished: {len(runs) - len(todo)} of {len(runs)} runs")
    with ThreadPoolExecutor(options.workers) as pool:
        pending = [pool.submit(fine_tune, options, setting, (seed,), n) for n, (setting, seed) in enumerate(todo)]
        try:
            for run in tqdm(as_completed(pending), "grid", len(pending), unit="run"):
                run.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    print(table({setting: collect(options, setting) for setting in options.settings}))


def shared_settings(options: GridOptions) -> dict:
    """The settings that all of the grid's runs share. Raises ValueError for options that any of them would refuse."""
    for setting in options.settings:
        run = options.finetune_options(setting, options.seeds)
        check_batch_size(run, num_ranks=1)
    shared = prepare_run(run).settings
    if not options.is_baseline:  # a baseline has none of these
        del shared["epochs"], shared["batch_size"]
        del shared["deepspeed_config"]["train_batch_size"], shared["deepspeed_config"]["optimizer"]["params"]["lr"]
    return shared


def fine_tune(options: GridOptions, setting: Setting, seeds: tuple[int, ...], number: int) -> None:
    """Run one `evaluation.finetune`. If it fails, raise ValueError or OSError with the last line that it printed."""
    command = [sys.executable, "-m", "evaluation.finetune", *command_line(options.finetune_options(setting, seeds))]
    log = options.output / "logs" / f"{setting.name}_seed-{'-'.join(map(str, seeds))}.log"
    with open(log, "w", encoding="utf-8") as file:
        environment = environment_side_by_side(number % options.workers, options.workers)
        code = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"]
        kind = ValueError if code == 2 else OSError
        raise kind(
            f"{setting.name}, seed {', '.join(map(str, seeds))}: {lines[-1].removeprefix('error: ')} (all: {log})"
        )


def collect(options: GridOptions, setting: Setting) -> dict:
    """The results of a setting over the seeds of this command."""
    path = options.output / setting.name / RESULTS_FILE
    # If two seeds end at the same moment, results.json may lack one of them. Running the command again rewrites it.
    if not path.exists() or not set(options.seeds) <= {row["seed"] for row in read_json(path)["seeds"]}:
        fine_tune(options, setting, options.seeds, 0)
    metrics = read_json(path)["metrics"]
    seeds = [row for row in read_seeds(path.parent) if row["seed"] in options.seeds]
    return {"metrics": metrics, **summarize(seeds, metrics)}


def table(results: dict[Setting, dict]) -> str:
    """One row per setting, the best median first: scores of the first metric, in percent."""
    metric = next(iter(results.values()))["metrics"][0]
    rows = []
    for setting, result in results.items():
        last, best = result["last"][metric], result["best"][metric]
        scores = [percent(last["median"]), mean_and_spread(last), percent(last["max"]), mean_and_spread(best)]
        rows.append((score_rank(last["median"]), [*setting, *scores]))
    rows.sort(key=lambda pair: -pair[0])
    headers = ["learning rate", "batch", "epochs", f"{metric}: median", "mean ± std", "best seed", "at the best epochs"]
    return tabulate([row for _, row in rows], headers, disable_numparse=True, stralign="right")


if __name__ == "__main__":
    run_cli(main)
