"""The results of a fine-tuning run: what its folder holds, its summary over seeds, and the table that is printed.

    OUTPUT/run.json           the resolved configuration: task, files and their sha256, start, model, DeepSpeed;
                                   not the number of ranks, nor how they cut a batch
    OUTPUT/seed_0/metrics.jsonl    {kind: "train", step, loss, learning_rate} a step, {kind: "dev", epoch, ...} an epoch
    OUTPUT/seed_0/predictions.*    each dev row's after the last epoch, in the task's own files
    OUTPUT/seed_0/finished.json      {seed, best_epoch, epochs: [{epoch, step, losses, scores, examples_per_s}]},
                                   written last: a seed that has it is finished and is not run again
    OUTPUT/results.json            all finished seeds; mean, median, std, min and max of each metric, after the last
                                   epoch and at each seed's best epoch

A baseline has one epoch and no losses. An undefined score (a correlation with constant predictions) is null.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sklearn.metrics
from tabulate import tabulate

from data_prep.files import read_json, write_json
from evaluation.tasks.metrics import spread
from evaluation.tasks.task import Task

RESULTS_FILE = "results.json"


def seed_folder(output: Path, seed: int) -> Path:
    """Where the files of one seed stand."""
    return output / f"seed_{seed}"


def seed_result_file(output: Path, seed: int) -> Path:
    """The file that says that a seed is finished."""
    return seed_folder(output, seed) / "finished.json"


def best_epoch(epochs: Sequence[dict], metric: str) -> int:
    """The number of the epoch with the highest dev `metric`, the earliest on a tie."""
    best = max(epochs, key=lambda row: -math.inf if row["scores"][metric] is None else row["scores"][metric])
    return best["epoch"]


def finish_seed(output: Path, seed: int, task: Task, epochs: list[dict], examples: Sequence, predictions) -> None:
    """Write the predictions after the last epoch, then the seed's finished.json."""
    folder = seed_folder(output, seed)
    folder.mkdir(exist_ok=True)
    task.write(folder, examples, predictions)
    best = best_epoch(epochs, task.metrics[0])
    write_json(seed_result_file(output, seed), {"seed": seed, "best_epoch": best, "epochs": epochs})


def read_seeds(output: Path) -> list[dict]:
    """The finished.json of every finished seed of a run folder, in the order of the seeds."""
    return sorted((read_json(path) for path in output.glob("seed_*/finished.json")), key=lambda row: row["seed"])


def summarize(seeds: Sequence[dict], head: dict) -> dict:
    """The seeds under `head` (task, start, metrics ...) with their summary: what results.json holds."""
    return {**head, **{which: _summary(seeds, which, head["metrics"]) for which in ("last", "best")}, "seeds": seeds}


def _summary(seeds: Sequence[dict], which: str, metrics: Sequence[str]) -> dict[str, dict]:
    chosen = [scores_of(row, which) for row in seeds]
    return {metric: spread([scores[metric] for scores in chosen]) for metric in metrics}


def scores_of(seed_result: dict, which: str) -> dict[str, float | None]:
    """The dev scores of one seed at its "last" or its "best" epoch."""
    epochs = seed_result["epochs"]
    if which == "last":
        return epochs[-1]["scores"]
    return next(row["scores"] for row in epochs if row["epoch"] == seed_result["best_epoch"])


def confusion_matrix(output: Path) -> dict | None:
    """{labels, counts [label][prediction]: dev rows, summed over the seeds, after the last epoch}, from the seeds'
    predictions.tsv; None for a task without classes.
    """
    counts, labels = 0, []
    for path in sorted(output.glob("seed_*/predictions.tsv")):
        with open(path, encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            labels = [name[2:-1] for name in rows.fieldnames or [] if name.startswith("p(")]
            pairs = [(row["label"], row["prediction"]) for row in rows] if labels else []
        if pairs:
            counts += sklearn.metrics.confusion_matrix(*zip(*pairs, strict=True), labels=labels)
    return {"labels": labels, "counts": np.asarray(counts).tolist()} if labels else None


def percent(value: float | None) -> str:
    """A score as it is printed: in percent, or n/a where it is undefined."""
    return "n/a" if value is None else f"{100 * value:.1f}"


def mean_and_spread(summary: dict) -> str:
    """Mean and standard deviation over seeds, in percent: "71.3 ± 0.8"."""
    return "n/a" if summary["mean"] is None else f"{percent(summary['mean'])} ± {percent(summary['std'])}"


def seed_table(results: dict) -> str:
    """The table printed at the end of a run: a row a seed, then mean ± standard deviation; last and best epoch apart,
    in percent.
    """
    metrics = results["metrics"]
    rows = [
        [row["seed"], *(percent(scores_of(row, "last")[m]) for m in metrics),
         *(percent(scores_of(row, "best")[m]) for m in metrics), row["best_epoch"]]
        for row in results["seeds"]
    ]  # fmt: skip
    summaries = [mean_and_spread(results[which][metric]) for which in ("last", "best") for metric in metrics]
    headers = ["seed", *(f"{m}, last" for m in metrics), *(f"{m}, best" for m in metrics), "best epoch"]
    return tabulate([*rows, ["mean ± std", *summaries, ""]], headers, disable_numparse=True, stralign="right")


def detail_table(results: dict) -> str:
    """The scores after the last epoch that have no column in the main table (by type of entity, with and without an
    answer): mean ± standard deviation and each seed, in percent, a threshold as it is. "" if there are none.
    """
    seeds = [scores_of(row, "last") for row in results["seeds"]]
    names = [name for name in seeds[0] if name not in results["metrics"]]
    rows = []
    for name in names:
        values = [scores.get(name) for scores in seeds]
        if name.endswith("threshold"):
            rows.append([name, "", *(f"{value:.3f}" for value in values)])
        else:
            rows.append([name, mean_and_spread(spread(values)), *map(percent, values)])
    headers = ["last epoch", "mean ± std", *(f"seed {row['seed']}" for row in results["seeds"])]
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(rows, headers, disable_numparse=True, colalign=align) if rows else ""
