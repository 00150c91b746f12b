"""The results of a fine-tuning run: what its folder holds, its summary over seeds, and the table that is printed.

    OUTPUT/run.json               the resolved settings: task, files and their sha256, start, model, DeepSpeed; not the
                                  number of ranks or the micro-batch size
    OUTPUT/seed_0/metrics.jsonl   per step {kind: "train", step, loss, learning_rate}, per epoch {kind: "eval", epoch,
                                  ...} with the scores on the dev set
    OUTPUT/seed_0/predictions.*   the dev predictions after the last epoch, in the task's own files
    OUTPUT/seed_0/finished.json   {seed, best_epoch, epochs: [{epoch, step, losses, scores, examples_per_s}]}, written
                                  last: a seed that has it is finished and is not run again
    OUTPUT/results.json           all finished seeds; mean, median, std, min and max of each metric, after the last
                                  epoch and at each seed's best epoch

A baseline has one epoch and no losses. An undefined score, such as a correlation with constant predictions, is null.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import sklearn.metrics
from tabulate import tabulate

from data_prep.files import FINISHED_FILE, read_json
from evaluation.tasks.metrics import spread

RESULTS_FILE = "results.json"


def seed_folder(output: Path, seed: int) -> Path:
    return output / f"seed_{seed}"


def seed_result_file(output: Path, seed: int) -> Path:
    """This file exists once the seed is finished."""
    return seed_folder(output, seed) / FINISHED_FILE


def score_rank(score: float | None) -> float:
    """The score as a sort key: an undefined one ranks below all others."""
    return -math.inf if score is None else score


def best_epoch(epochs: Sequence[dict], metric: str) -> int:
    """The number of the epoch with the highest dev `metric`, the earliest on a tie."""
    return max(epochs, key=lambda row: score_rank(row["scores"][metric]))["epoch"]


def read_seeds(output: Path) -> list[dict]:
    """The content of finished.json of every finished seed, sorted by seed."""
    return sorted((read_json(path) for path in output.glob(f"seed_*/{FINISHED_FILE}")), key=lambda row: row["seed"])


def scores_of(seed_result: dict, which: str) -> dict[str, float | None]:
    """The dev scores of one seed at its "last" or its "best" epoch."""
    epochs = seed_result["epochs"]
    if which == "last":
        return epochs[-1]["scores"]
    return next(row["scores"] for row in epochs if row["epoch"] == seed_result["best_epoch"])


def summarize(seeds: Sequence[dict], metrics: Sequence[str]) -> dict:
    """The computed part of results.json: {"last": {metric: spread over seeds}, "best": the same, "seeds": seeds}."""
    summary = {
        which: {metric: spread([scores_of(row, which)[metric] for row in seeds]) for metric in metrics}
        for which in ("last", "best")
    }
    return {**summary, "seeds": seeds}


def confusion_matrix(output: Path) -> dict | None:
    """{labels, counts: [label][prediction]} on the dev set, last epoch, summed over seeds; None without classes."""
    labels, answers = [], []
    for path in sorted(output.glob("seed_*/predictions.tsv")):
        with open(path, encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            labels = [name[2:-1] for name in rows.fieldnames or [] if name.startswith("p(")]
            answers += [(row["label"], row["prediction"]) for row in rows]
    if not (labels and answers):
        return None
    counts = sklearn.metrics.confusion_matrix(*zip(*answers, strict=True), labels=labels)
    return {"labels": labels, "counts": counts.tolist()}


def percent(value: float | None) -> str:
    """A score as it is printed: in percent, or n/a if it is undefined."""
    return "n/a" if value is None else f"{100 * value:.1f}"


def mean_and_spread(summary: dict) -> str:
    """Mean and standard deviation over seeds, in percent: "71.3 ± 0.8"."""
    return "n/a" if summary["mean"] is None else f"{percent(summary['mean'])} ± {percent(summary['std'])}"


def seed_table(results: dict) -> str:
    """The final table, in percent: one row per seed and one for mean ± std; columns for the last and the best epoch."""
    columns = [(which, metric) for which in ("last", "best") for metric in results["metrics"]]
    rows = [
        [row["seed"], *(percent(scores_of(row, which)[metric]) for which, metric in columns), row["best_epoch"]]
        for row in results["seeds"]
    ]
    rows.append(["mean ± std", *(mean_and_spread(results[which][metric]) for which, metric in columns), ""])
    headers = ["seed", *(f"{metric}, {which}" for which, metric in columns), "best epoch"]
    return tabulate(rows, headers, disable_numparse=True, stralign="right")


def detail_table(results: dict) -> str:
    """Last-epoch scores that the main table leaves out, such as F1 by entity type: mean ± std, then each seed, in
    percent. Thresholds are raw values. Returns "" if there are no such scores.
    """
    seeds = [scores_of(row, "last") for row in results["seeds"]]
    rows = []
    for name in (name for name in seeds[0] if name not in results["metrics"]):
        values = [scores.get(name) for scores in seeds]
        if name.endswith("threshold"):
            rows.append([name, "", *(f"{value:.3f}" for value in values)])
        else:
            rows.append([name, mean_and_spread(spread(values)), *map(percent, values)])
    headers = ["last epoch", "mean ± std", *(f"seed {row['seed']}" for row in results["seeds"])]
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(rows, headers, disable_numparse=True, colalign=align) if rows else ""
