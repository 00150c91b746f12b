"""The report's tables. Their cells are text, so that the terminal, the Markdown file and the page show the same."""

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from data_prep.files import RUN_FILE, read_json
from evaluation.report_page.published import published_score
from evaluation.run_folder import mean_and_spread, percent, scores_of
from evaluation.tasks.metrics import spread
from pretrain.metrics_file import flattened, read_metrics
from pretrain.model_config import load_model_config
from pretrain.parameter_table import num_parameters

STARTS = ("pretrained", "random", "ngram", "majority")
DATA_KINDS = {"megatron-indexed-dataset": "tokenised corpus", "bert-masked-shards": "masked shards"}
LEFT_ALIGNED = {"task", "score", "metric", "start", "run", "setting", "folder", "kind", "optimizer"}
DISTINCTIONS = (  # between groups of one task, in the order in which a title names them
    "{data}",
    "{num_train:,} training examples",
    "training set {train_sha256:.8}",
    "dev set {dev_sha256:.8}",
)


class Table(NamedTuple):
    """Headers, and rows of text."""

    headers: tuple[str, ...]
    rows: list[list[str]]

    def text(self, style: str) -> str:
        """The table in one of tabulate's styles: "simple" for a terminal, "github" for Markdown, "html" for a page."""
        align = ["left" if header in LEFT_ALIGNED else "right" for header in self.headers]
        return tabulate(self.rows, self.headers, tablefmt=style, disable_numparse=True, colalign=align)


def task_groups(results: dict[str, dict]) -> dict[str, list[dict]]:
    """Groups of comparable fine-tuning runs, with the same task, training examples and dev file. Each run gets a
    `label`, and each group is sorted by STARTS.
    """
    groups: dict[tuple, list[dict]] = {}
    for name, run in results.items():
        key = (run["task"], run["train_sha256"], run["num_train"], run["dev_sha256"])
        groups.setdefault(key, []).append({**run, "run": name})
    firsts = [runs[0] for runs in groups.values()]
    named = {}
    for runs in groups.values():
        starts = [run["start"] for run in runs]
        for run in runs:
            run["label"] = run["start"] if starts.count(run["start"]) == 1 else f"{run['start']} ({run['run']})"
        named[_title(runs[0], firsts)] = sorted(runs, key=lambda run: STARTS.index(run["start"]))
    return named


def _title(run: dict, others: Sequence[dict]) -> str:
    """The task, and how its data differ from those of the other groups of the same task."""
    rivals, parts = [other for other in others if other["task"] == run["task"]], []
    for form in DISTINCTIONS:
        same = [other for other in rivals if form.format_map(other) == form.format_map(run)]
        if len(same) < len(rivals):
            rivals, parts = same, [*parts, form.format_map(run)]
    return f"{run['task']} ({', '.join(parts)})" if parts else run["task"]


def score_table(groups: dict[str, list[dict]]) -> Table:
    """The main table: dev scores in percent, one row per task, metric and start, and one per published score."""
    headers = ("task", "metric", "start", "last: mean ± std", "median", "each seed", "best: mean ± std", "train", "dev")
    rows = []
    for task, runs in groups.items():
        for metric in runs[0]["metrics"]:
            for run in runs:
                last, best = run["last"][metric], run["best"][metric]
                seeds = "  ".join(percent(scores_of(seed, "last")[metric]) for seed in run["seeds"])
                sizes = (f"{run['num_train']:,}", f"{run['num_dev']:,}")
                scores = (mean_and_spread(last), percent(last["median"]), seeds, mean_and_spread(best))
                rows.append([task, metric, run["label"], *scores, *sizes])
            if known := published(runs, metric):
                rows.append([task, metric, f"published: {known[0]}", f"{known[1]:.1f}", *[""] * 5])
    return Table(headers, rows)


def published(runs: Sequence[dict], metric: str) -> tuple[str, float] | None:
    """The published score (whose, percent) for the first of these runs whose size has one."""
    scores = (published_score(run.get("model"), run["task"], metric) for run in runs)
    return next(filter(None, scores), None)


def overview(groups: dict[str, list[dict]]) -> Table:
    """The first metric of each task after the last epoch, mean ± std: one column per start and a published score."""
    starts = dict.fromkeys(run["label"] for runs in groups.values() for run in runs)
    rows = []
    for task, runs in groups.items():
        metric = runs[0]["metrics"][0]
        scores = {run["label"]: mean_and_spread(run["last"][metric]) for run in runs}
        known = published(runs, metric)
        shown = f"{known[1]:.1f} ({known[0]})" if known else ""
        rows.append([task, metric, *(scores.get(start, "") for start in starts), shown])
    return Table(("task", "metric", *starts, "published"), rows)


def detail_scores(runs: Sequence[dict]) -> Table:
    """Last-epoch scores that the main table leaves out, such as F1 by entity type: mean ± std, one column per start."""
    seeds = {run["label"]: [scores_of(seed, "last") for seed in run["seeds"]] for run in runs}
    names = [name for scores in seeds.values() for name in scores[0] if name not in runs[0]["metrics"]]
    rows = []
    for name in dict.fromkeys(names):
        if not name.endswith("threshold"):
            rows.append([name, *(mean_and_spread(spread([s.get(name) for s in scores])) for scores in seeds.values())])
    return Table(("score", *seeds), rows)


def verdicts(groups: dict[str, list[dict]]) -> list[str]:
    """One sentence per pretrained run and other start of its group, on the first metric after the last epoch."""
    sentences = []
    for task, runs in groups.items():
        metric = runs[0]["metrics"][0]
        scored = [run for run in runs if run["last"][metric]["mean"] is not None]
        for ours in (run for run in scored if run["start"] == "pretrained"):
            others = (run for run in scored if run["start"] != "pretrained")
            sentences += [f"{task}, {metric}: {_verdict(ours, other, metric)}." for other in others]
    return sentences


def _verdict(ours: dict, other: dict, metric: str) -> str:
    """How far apart the means are, and whether the seeds overlap."""
    our, their = ours["last"][metric], other["last"][metric]
    points = 100 * (our["mean"] - their["mean"])
    amount = f"{abs(points):.1f}" if abs(points) >= 0.05 else "less than 0.1"
    is_level = abs(points) < 1e-9  # the rounding error of equal means
    distance = "level with" if is_level else f"{amount} points {'above' if points > 0 else 'below'}"
    apart = not is_level and (our["min"] > their["max"] or our["max"] < their["min"])
    overlap = "no seed of one reaches the other" if apart else "their seeds overlap"
    models = [run["model"] for run in (ours, other) if run.get("model")]
    sizes = {(model["num_hidden_layers"], model["hidden_size"]) for model in models}
    caution = "; their models differ in size" if len(sizes) > 1 else ""
    return f"{ours['label']} is {distance} {other['label']}; {overlap}{caution}"


def pretraining_facts(name: str, folder: Path) -> dict[str, str]:
    """{heading: value} of a pretraining run. Losses, accuracies and norms are the last ones. Speeds are medians,
    because single rows vary with the load of the machine.
    """
    train, held_out = read_metrics(folder, "train"), read_metrics(folder, "eval")
    last, final = train[-1], held_out[-1] if held_out else {}
    entropy, loss = final.get("unigram_entropy"), final.get("mlm_loss")
    config, deepspeed = load_model_config(folder / "config.json"), read_json(folder / "deepspeed_config.json")
    batch, optimizer = deepspeed["train_batch_size"], deepspeed["optimizer"]
    rate = {key: statistics.median(row[key] for row in train) for key in ("samples_per_s", "tokens_per_s", "mfu")}
    num_sequences = last["step"] * batch
    num_tokens = num_sequences * rate["tokens_per_s"] / rate["samples_per_s"]
    return {
        "run": name,
        "steps": f"{last['step']:,}",
        "MLM loss, training": f"{last['mlm_loss']:.3f}",
        "MLM loss, held out": _format(loss, ".3f"),
        "the same on [MASK] alone": _format(final.get("mask_token_loss"), ".3f"),
        "unigram entropy": _format(entropy, ".3f"),
        "below it, nat": _format(entropy and entropy - loss, ".3f"),
        "MLM accuracy": _format(final.get("mlm_accuracy"), ".1%"),
        "pair accuracy": _format(final.get("pair_accuracy"), ".1%"),
        "gradient norm": _format(last.get("grad_norm"), ".3g"),
        "median trust ratio": _format(last.get("trust_ratio_median"), ".3g"),
        "learning rate": _format(last.get("learning_rate"), ".3g"),
        "peak rate": f"{optimizer['params']['lr']:g}",
        "parameters": f"{num_parameters(config):,}",
        "layers x hidden": f"{config.num_hidden_layers} x {config.hidden_size}",
        "optimizer": optimizer["type"],
        "batch": f"{batch:,}",
        "sequences seen": f"{num_sequences:,}",
        "tokens seen": f"{num_tokens / 1e6:,.1f} M",
        "sequences/s": f"{rate['samples_per_s']:,.0f}",
        "tokens/s": f"{rate['tokens_per_s']:,.0f}",
        "MFU": f"{rate['mfu']:.1%}",
        "memory, GiB": f"{max(row['memory_gib'] for row in train):.2f}",
    }


def pretraining_table(facts: Sequence[dict[str, str]]) -> Table:
    """One column per run and one row per fact, because there are more facts than runs."""
    rows = [[key, *(fact[key] for fact in facts)] for fact in facts[:1] for key in fact if key != "run"]
    return Table(("run", *(fact["run"] for fact in facts)), rows)


def differing_settings(runs: dict[str, Path]) -> Table:
    """One row per setting of run.json that is not the same in all pretraining runs, one column per run."""
    settings = [flattened(read_json(folder / RUN_FILE)) for folder in runs.values()]
    rows = []
    for key in sorted({key for of_run in settings for key in of_run}):
        values = [json.dumps(of_run[key]) if key in of_run else "" for of_run in settings]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return Table(("setting", *runs), rows)


def data_table(manifests: dict[str, dict]) -> Table:
    """Sizes of corpora and shards; a size that does not apply stays empty."""
    counts = ("documents", "sentences", "tokens", "sequences", "predictions")
    headers = ("folder", "kind", *counts, "sequence length", "vocabulary")
    rows = []
    for name, manifest in manifests.items():
        numbers = [_format(manifest.get(f"num_{count}"), ",") for count in counts]
        length = _format(manifest["config"].get("seq_length"), ",")
        rows.append([name, DATA_KINDS[manifest["format"]], *numbers, length, f"{manifest['vocab']['size']:,}"])
    return Table(headers, rows)


def _format(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def short_names(folders: Sequence[Path]) -> list[str]:
    """The paths without their common parent, such as finetune/random. Raises ValueError for a folder named twice."""
    paths = [folder.resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} is named twice; name each run once")
    common = Path(os.path.commonpath(paths)) if len(paths) > 1 else paths[0].parent
    return [str(path.relative_to(common)) if path != common else path.name for path in paths]
