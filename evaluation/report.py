"""CLI: runs -> one table over tasks and starts, plots, one self-contained HTML page and its tables as Markdown.

    python -m evaluation.report runs/pretrain runs/finetune/* runs/shards/train --output report.html

Folders are told apart by their files: results.json is a fine-tuning run or a baseline, run.json a pretraining run,
manifest.json a corpus or shards.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.cli import run_cli
from data_prep.files import finished_file, read_json
from evaluation.report_page.page import MARK, Section, render_matrix, render_page
from evaluation.report_page.plots import (
    curves,
    loss_curves,
    scores_by_epoch,
    scores_by_start,
    scores_by_type,
    trust_ratios,
)
from evaluation.report_page.tables import (
    DATA_KINDS,
    Table,
    data_table,
    detail_scores,
    overview,
    pretraining_facts,
    pretraining_table,
    published,
    score_table,
    short_names,
    task_groups,
    verdicts,
)
from evaluation.run_folder import RESULTS_FILE, confusion_matrix, mean_and_spread
from pretrain.metrics_file import read_metrics

CURVES = {
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm before clipping",
    "tokens_per_s": "Throughput (tokens/s)",
}


class Runs(NamedTuple):
    """What was given, by kind: pretraining folders, contents of results.json, contents of manifest.json; keys tell
    folders apart.
    """

    pretraining: dict[str, Path]
    finetuning: dict[str, dict]
    data: dict[str, dict]


def read_runs(folders: Sequence[Path]) -> Runs:
    """Recognise each folder by its files. Raises ValueError for one that is no run, or has nothing to show yet."""
    runs = Runs({}, {}, {})
    for name, folder in zip(short_names(folders), folders, strict=True):
        if (folder / RESULTS_FILE).is_file():
            train = read_json(folder / "run.json")["train"]
            run = read_json(folder / RESULTS_FILE) | {"train_sha256": train["sha256"]}
            runs.finetuning[name] = run | {"confusion": confusion_matrix(folder)}
        elif (folder / "run.json").is_file():
            if not ((folder / "metrics.jsonl").is_file() and read_metrics(folder, "train")):
                raise ValueError(f"{folder}: no step of this pretraining run is in metrics.jsonl yet; train first")
            runs.pretraining[name] = folder
        elif (folder / "manifest.json").is_file() and read_json(folder / "manifest.json").get("format") in DATA_KINDS:
            runs.data[name] = read_json(folder / "manifest.json")
        else:
            raise ValueError(
                f"{folder} is no fine-tuning run ({RESULTS_FILE}), no pretraining run (run.json), no corpus and no "
                "shards (manifest.json); name a folder that such a command has finished"
            )
    return runs


def check_replaceable(path: Path) -> None:
    """Raises ValueError if `path` is a file that is no report."""
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:200]:
        raise ValueError(f"{path} exists and is no report; choose another --output")


def score_sections(groups: dict[str, list[dict]]) -> list[Section]:
    """The main table, then a card of figures a task."""
    introduction = (
        "Dev scores in percent, mean and standard deviation over seeds. The best epoch is picked on the dev set "
        "itself, so it flatters; the last epoch does not."
    )
    tables = [overview(groups).text("html"), score_table(groups).text("html")]
    sections = [Section("Scores", introduction, tables, {}, verdicts(groups))]
    for task, runs in groups.items():
        metric = runs[0]["metrics"][0]
        details = detail_scores(runs)
        figures = {
            f"{metric} by start": scores_by_start(runs, metric, published(runs, metric)),
            f"{metric} by epoch": scores_by_epoch(runs, metric),
            "By type": scores_by_type(runs, [row[0] for row in details.rows]),
        }
        folders = ", ".join(dict.fromkeys(run["data"] for run in runs))
        sizes = f"{runs[0]['num_train']:,} training and {runs[0]['num_dev']:,} dev examples from {folders}."
        tables = [details.text("html")] if details.rows else []
        matrices = [render_matrix(run["label"], **run["confusion"]) for run in runs if run["confusion"]]
        shown = {name: uri for name, uri in figures.items() if uri}
        sections.append(Section(task, sizes, tables, shown, matrices=matrices))
    return sections


def pretraining_section(runs: dict[str, Path], table: Table) -> Section:
    """The table, curves, and each run's configuration to unfold."""
    introduction = (
        "The unigram entropy is the loss of a model that knows how frequent each token is and nothing of its context. "
        "Speeds are medians over the run."
    )
    rows = {name: read_metrics(folder) for name, folder in runs.items()}
    figures = {"Masked-LM loss": loss_curves(rows)}
    figures |= {title: curves(rows, key, title) for key, title in CURVES.items()}
    figures["Trust ratios"] = trust_ratios(rows)
    shown = {name: uri for name, uri in figures.items() if uri}
    unfold = {f"Configuration of {name}": (folder / "run.json").read_text("utf-8") for name, folder in runs.items()}
    return Section("Pretraining", introduction, [table.text("html")], shown, unfold=unfold)


def first_numbers(groups: dict[str, list[dict]], facts: Sequence[dict[str, str]]) -> dict[str, str]:
    """The tiles at the top, {what: value}: what a reader wants to know first, of the first run of each kind. Scores
    come before losses and speeds.
    """
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
    groups = task_groups(runs.finetuning)
    facts = [pretraining_facts(name, folder) for name, folder in runs.pretraining.items()]
    tables = {
        "At a glance": overview(groups),
        "Scores": score_table(groups),
        "Pretraining": pretraining_table(facts),
        "Data": data_table(runs.data),
    }
    tables = {name: table for name, table in tables.items() if table.rows}
    sections = score_sections(groups) if groups else []
    if facts:
        sections.append(pretraining_section(runs.pretraining, tables["Pretraining"]))
    if runs.data:
        sections.append(Section("Data", "Counts of the manifests.", [tables["Data"].text("html")], {}))
    made = f"Made {time.strftime('%Y-%m-%d %H:%M')} from {', '.join([*runs.pretraining, *runs.finetuning, *runs.data])}"
    paragraphs = [f"## {name}\n\n{table.text('github')}" for name, table in tables.items()]
    output.parent.mkdir(parents=True, exist_ok=True)
    with finished_file(output, "w") as file:
        file.write(render_page(title, made, first_numbers(groups, facts), sections))
    with finished_file(output.with_suffix(".md"), "w") as file:
        file.write("\n\n".join([MARK, f"# {title}", made, *paragraphs, *verdicts(groups)]) + "\n")
    for name, table in tables.items():
        print(f"\n{name}\n{table.text('simple')}")
    print("", *verdicts(groups), f"Written: {output} and {output.with_suffix('.md')}", sep="\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.report",
        description="Compare runs: dev scores over tasks and starts, pretraining curves, sizes and speeds, in one HTML "
        "page without outside links, as Markdown beside it, and in the terminal.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a pretraining, a fine-tuning, a corpus or shards"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE.html", help="the page; a report there is replaced"
    )
    parser.add_argument(
        "--title", default="BERT: from text to scores", help="headline of the page (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.output.suffix != ".html":
        raise ValueError(f"--output {args.output}: a name that ends in .html is due")
    runs = read_runs(args.runs)
    for path in (args.output, args.output.with_suffix(".md")):
        check_replaceable(path)
    write_report(runs, args.title, args.output)


if __name__ == "__main__":
    run_cli(main)
