"""docs/performance.md from all files in benchmarks/results/: their tables, and plots of what is compared.

    python -m benchmarks.document

The words above the mark in that file are written by hand; everything below it is made, the stages' floors first.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from tabulate import tabulate

from benchmarks.measure import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
FIGURES = PAGE.with_name("figures")
MARK = "<!-- made by benchmarks.document from benchmarks/results; do not edit below -->"
plt.rcParams["svg.hashsalt"] = "0"  # the same names inside at every run
BLUE, GREY = "#0072B2", "#8A8F98"
# What is drawn of a topic, by the beginning of its name: (the table's title begins, kind of plot, label, value).
PLOTS = {
    "floors": ("Every stage", "bars", "stage", "share of the floor's speed, %"),
    "step": ("One step", "bars", "what", "ms"),
    "optimizer": ("One step", "bars", "what", "median ms"),
    "data-prep": ("Beside a peer", "bars", "what", "MB/s"),
    "scaling": ("Predicted", "lines", "GPUs", "efficiency"),
    "large-batch": ("Held-out", "lines", "batch", ("LAMB, one rate", "LAMB, tuned", "AdamW, tuned")),
}


def draw(name: str, result: dict) -> str:
    """The Markdown of a result's plot, which goes to docs/figures/NAME.svg; nothing for a topic without one."""
    topic = next((topic for topic in PLOTS if name.startswith(topic)), None)
    if topic is None:
        return ""
    title, kind, label, values = PLOTS[topic]
    found = [(known, rows) for known, rows in result["tables"].items() if known.startswith(title)]
    if not found:
        return ""
    table, rows = found[0]
    figure, axes = plt.subplots(figsize=(7, 0.5 * len(rows) + 1.2 if kind == "bars" else 3.6), layout="constrained")
    if kind == "bars":
        names, numbers = [str(row[label]) for row in rows], [row[values] for row in rows]
        bars = axes.barh(names, numbers, color=[BLUE if name.startswith(("ours", "LAMB")) else GREY for name in names])
        axes.bar_label(bars, fmt="%.3g", padding=3)
        if max(numbers) > 50 * min(numbers):
            axes.set_xscale("log")
        axes.invert_yaxis()
        axes.set_xlabel(values)
    else:
        for series, points in lines(rows, label, values):
            axes.plot(*zip(*points, strict=True), marker="o", label=series)
        axes.set(xscale="log", xlabel=label, ylabel=values if isinstance(values, str) else "held-out loss, nat")
        axes.legend()
    axes.set_title(table, fontsize=9, loc="left", wrap=True)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
    return f"![{table}](figures/{name}.svg)\n"


def lines(rows: list[dict], label: str, values: str | tuple[str, ...]) -> list[tuple[str, list[tuple]]]:
    """Named series of points: a column each, or one column by model."""
    if isinstance(values, tuple):
        return [(name, [(row[label], row[name]) for row in rows]) for name in values]
    models = dict.fromkeys(row["model"] for row in rows)
    return [(model, [(row[label], row[values]) for row in rows if row["model"] == model]) for model in models]


def section(path: Path) -> str:
    """A saved result as Markdown: where and when, a plot, every table."""
    result = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [f"## {path.stem}", f"{result['device']}, {result['num_cores']} cores, {result['date']}; {versions}.\n"]
    parts.append(draw(path.stem, result))
    for title, rows in result["tables"].items():
        parts.append(f"**{title}**\n\n{tabulate(rows, headers='keys', tablefmt='github', floatfmt='.4g')}\n")
    return "\n".join(filter(None, parts))


def main() -> None:
    above = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    paths = sorted(RESULTS.glob("*.json"), key=lambda path: (not path.name.startswith("floors"), path.name))
    sections = [section(path) for path in paths]
    PAGE.write_text("\n".join([above.rstrip() + "\n", MARK, "", *sections]), encoding="utf-8")
    print(f"Written: {PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE}")


if __name__ == "__main__":
    main()
