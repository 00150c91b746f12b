"""CLI: compares runs in tables and plots, as one self-contained HTML page, with the tables also as Markdown.

    python -m evaluation.report runs/pretrain runs/finetune/* runs/shards/train --output report.html

A folder is recognised by its files: a fine-tuning run or a baseline has results.json, a pretraining run metrics.jsonl,
a corpus or shards manifest.json. Nothing here needs torch.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_prep.cli import option, parse, run_cli
from data_prep.files import RUN_FILE, finished_file, read_json
from evaluation.report_page import plots, tables
from evaluation.report_page.page import MARK, Section, render_matrix, render_page
from evaluation.run_folder import RESULTS_FILE, confusion_matrix, mean_and_spread
from pretrain.metrics_file import read_metrics

CURVES = (  # kind of row, key, title; a quantity that no run has is left out
    ("train", "loss", "Training loss with the pair task (nats)"),
    ("eval", "mlm_accuracy", "Held-out MLM accuracy"),
    ("eval", "pair_accuracy", "Held-out pair accuracy"),
    ("train", "learning_rate", "Learning rate"),
    ("train", "grad_norm", "Gradient norm before clipping"),
    ("train", "tokens_per_s", "Throughput (tokens/s)"),
    ("train", "mfu", "MFU on real tokens"),
)


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Compare runs: dev scores over tasks and starts, pretraining curves, sizes and speeds.

    The report is one HTML page without external links. The same tables are written as Markdown and printed.
    """

    runs: tuple[Path, ...] = option(
        "folder of a pretraining or fine-tuning run, a corpus or shards", flags=("runs",), metavar="RUN"
    )
    output: Path = option("the page; an earlier report there is replaced", metavar="FILE.html")
    title: str = option("headline of the page", default="BERT: from text to scores", metavar="TEXT")


class Runs(NamedTuple):
    """The runs of a report by name: pretraining folders, contents of results.json, and contents of manifest.json."""

    pretraining: dict[str, Path]
    finetuning: dict[str, dict]
    data: dict[str, dict]


def read_runs(folders: Sequence[Path]) -> Runs:
    """Recognise each folder by its files. Raises ValueError for one that has nothing to show."""
    runs = Runs({}, {}, {})
    for name, folder in zip(tables.short_names(folders), folders, strict=True):
        if (folder / RESULTS_FILE).is_file():
            train = read_json(folder / RUN_FILE)["train"]
            run = read_json(folder / RESULTS_FILE) | {"train_sha256": train["sha256"]}
            runs.finetuning[name] = run | {"confusion": confusion_matrix(folder)}
        elif (folder / "metrics.jsonl").is_file() and read_metrics(folder, "train"):
            runs.pretraining[name] = folder
        elif (manifest := _manifest(folder)).get("format") in tables.DATA_KINDS:
            runs.data[name] = manifest
        else:
            raise ValueError(
                f"{folder} has no results of a fine-tuning ({RESULTS_FILE}), no step of a pretraining (metrics.jsonl) "
                "and is not a corpus or shards (manifest.json); name the folder of a run that has results"
            )
    return runs


def _manifest(folder: Path) -> dict:
    path = folder / "manifest.json"
    return read_json(path) if path.is_file() else {}


def check_replaceable(path: Path) -> None:
    """Raise ValueError if `path` is a file that is not a report."""
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:200]:
        raise ValueError(f"{path} exists and is not a report; choose another --output")


def score_sections(groups: dict[str, list[dict]]) -> list[Section]:
    """The main table, then one card of figures per task."""
    introduction = (
        "Dev scores in percent, mean and standard deviation over seeds. The best epoch is picked on the dev set "
        "itself, so it flatters; the last epoch does not."
    )
    main_tables = [tables.overview(groups).text("html"), tables.score_table(groups).text("html")]
    sections = [Section("Scores", introduction, main_tables, {}, tables.verdicts(groups))]
    for task, runs in groups.items():
        metric = runs[0]["metrics"][0]
        details = tables.detail_scores(runs)
        figures = {
            f"{metric} by start": plots.scores_by_start(runs, metric, tables.published(runs, metric)),
            f"{metric} by epoch": plots.scores_by_epoch(runs, metric),
            "By type": plots.scores_by_type(runs, [row[0] for row in details.rows]),
        }
        folders = ", ".join(dict.fromkeys(run["data"] for run in runs))
        sizes = f"{runs[0]['num_train']:,} training and {runs[0]['num_dev']:,} dev examples from {folders}."
        more = [details.text("html")] if details.rows else []
        matrices = [render_matrix(run["label"], **run["confusion"]) for run in runs if run["confusion"]]
        sections.append(Section(task, sizes, more, figures, matrices=matrices))
    return sections


def pretraining_section(runs: dict[str, Path], run_tables: Sequence[tables.Table]) -> Section:
    """The tables, one figure per quantity with the curves of all runs, and each run's collapsed configuration."""
    introduction = (
        "The unigram entropy is the loss of a model that knows how frequent each token is and nothing of its context. "
        "Speeds are medians over the run."
    )
    rows = {name: read_metrics(folder) for name, folder in runs.items()}
    figures = {"Masked-LM loss": plots.loss_curves(rows)}
    figures |= {title: plots.curves(rows, kind, key, title) for kind, key, title in CURVES}
    figures["Trust ratios"] = plots.trust_ratios(rows)
    unfold = {f"Configuration of {name}": (folder / RUN_FILE).read_text("utf-8") for name, folder in runs.items()}
    return Section("Pretraining", introduction, [table.text("html") for table in run_tables], figures, unfold=unfold)


def first_numbers(groups: dict[str, list[dict]], facts: Sequence[dict[str, str]]) -> dict[str, str]:
    """The tiles, {what: value}: scores of the first run of up to four tasks, and facts of the first pretraining run."""
    tiles = {}
    for task, runs in list(groups.items())[:4]:
        metric = runs[0]["metrics"][0]
        tiles[f"{task}: {metric}, {runs[0]['label']}"] = mean_and_spread(runs[0]["last"][metric])
    for fact in facts[:1]:
        if fact["unigram entropy"]:
            tiles[f"held-out MLM loss, unigram entropy {fact['unigram entropy']}"] = fact["MLM loss, held out"]
        tiles |= {name: fact[name] for name in ("parameters", "tokens seen", "tokens/s")}
    return tiles


def write_report(runs: Runs, title: str, output: Path) -> None:
    """Write the page to `output` and its tables beside it with the ending .md; print the tables."""
    groups = tables.task_groups(runs.finetuning)
    facts = [tables.pretraining_facts(name, folder) for name, folder in runs.pretraining.items()]
    shown = {
        "At a glance": tables.overview(groups),
        "Scores": tables.score_table(groups),
        "Pretraining": tables.pretraining_table(facts),
        "Settings that differ": tables.differing_settings(runs.pretraining),
        "Data": tables.data_table(runs.data),
    }
    shown = {name: table for name, table in shown.items() if table.rows}
    sections = score_sections(groups) if groups else []
    if facts:
        of_runs = [shown[name] for name in ("Pretraining", "Settings that differ") if name in shown]
        sections.append(pretraining_section(runs.pretraining, of_runs))
    if runs.data:
        sections.append(Section("Data", "Counts of the manifests.", [shown["Data"].text("html")], {}))
    made = f"Made {time.strftime('%Y-%m-%d %H:%M')} from {', '.join([*runs.pretraining, *runs.finetuning, *runs.data])}"
    paragraphs = [f"## {name}\n\n{table.text('github')}" for name, table in shown.items()]
    output.parent.mkdir(parents=True, exist_ok=True)
    with finished_file(output, "w") as file:
        file.write(render_page(title, made, first_numbers(groups, facts), sections))
    with finished_file(output.with_suffix(".md"), "w") as file:
        file.write("\n\n".join([MARK, f"# {title}", made, *paragraphs, *tables.verdicts(groups)]) + "\n")
    for name, table in shown.items():
        print(f"\n{name}\n{table.text('simple')}")
    print("", *tables.verdicts(groups), f"Written: {output} and {output.with_suffix('.md')}", sep="\n")


def main(argv: list[str] | None = None) -> None:
    options = parse(ReportOptions, "evaluation.report", argv)
    if options.output.suffix != ".html":
        raise ValueError(f"--output {options.output}: choose a name that ends in .html")
    runs = read_runs(options.runs)
    for path in (options.output, options.output.with_suffix(".md")):
        check_replaceable(path)
    write_report(runs, options.title, options.output)


if __name__ == "__main__":
    run_cli(main)
