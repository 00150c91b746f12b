"""Runs side by side: their curves as PNG files and as one HTML page, their last values and settings as tables."""

import base64
import html
import json
from pathlib import Path

from tabulate import tabulate

from data_prep.files import finished_file, read_json
from pretrain.metrics_file import flattened, read_metrics

# (kind of row, key, what the axis says); those that no run has are left out.
CURVES = (
    ("train", "loss", "training loss (nat)"),
    ("eval", "mlm_loss", "held-out MLM loss (nat)"),
    ("eval", "mlm_accuracy", "held-out MLM accuracy"),
    ("eval", "pair_accuracy", "held-out pair accuracy"),
    ("train", "learning_rate", "learning rate"),
    ("train", "grad_norm", "gradient norm"),
    ("train", "trust_ratio_median", "median trust ratio"),
    ("train", "samples_per_s", "sequences/s"),
    ("train", "mfu", "MFU on real tokens"),
)
STYLE = "body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem}img{max-width:100%}"
STYLE += "td,th{padding:.2rem .8rem;text-align:left;border-bottom:1px solid #ddd}table{border-collapse:collapse}"


def compare_runs(folders: list[Path], output: Path) -> list[Path]:
    """Writes a PNG a curve, and curves.html with all of them, into `output`; returns the files' paths.

    Raises ValueError for a folder that is no run or has logged nothing yet, and for two runs of one name.
    """
    names = [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"a run is named twice: {', '.join(names)}")
    rows = {name: read_run(Path(name)) for name in names}
    output.mkdir(parents=True, exist_ok=True)
    figures = []
    for kind, key, label in CURVES:
        lines = {
            name: [(row["step"], row[key]) for row in rows[name] if row["kind"] == kind and key in row]
            for name in names
        }
        if any(lines.values()):
            figures.append(draw(lines, label, output / f"{kind}_{key}.png"))
    page = output / "curves.html"
    with finished_file(page, "w") as file:
        file.write(render(names, rows, figures))
    return [*figures, page]


def read_run(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl; ValueError where there are none."""
    if not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder} has no metrics.jsonl, so it is no run folder of pretrain.train")
    rows = read_metrics(folder)
    if not rows:
        raise ValueError(f"{folder}/metrics.jsonl is empty: the run has logged nothing yet; come back later")
    return rows


def draw(lines: dict[str, list[tuple[int, float]]], label: str, path: Path) -> Path:
    """One figure: a line for each run that has points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, points in lines.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 20 else "")
    axes.set(xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def last_values(rows: dict[str, list[dict]]) -> list[list]:
    """A row a run: its last step and the last value of each curve."""
    table = []
    for name, of_run in rows.items():
        values = [[row[key] for row in of_run if row["kind"] == kind and key in row] for kind, key, _ in CURVES]
        table.append([name, of_run[-1]["step"], *(found[-1] if found else None for found in values)])
    return table


def differing_settings(names: list[str]) -> list[list]:
    """A row a setting of run.json that is not the same in all runs."""
    settings = [flattened(read_json(Path(name) / "run.json")) for name in names]
    keys = sorted({key for of_run in settings for key in of_run})
    rows = [[key, *(of_run.get(key) for of_run in settings)] for key in keys]
    return [row for row in rows if any(json.dumps(value) != json.dumps(row[1]) for value in row[1:])]


def render(names: list[str], rows: dict[str, list[dict]], figures: list[Path]) -> str:
    """The page, which refers to nothing outside itself."""
    headers = ["run", "last step", *(label for _, _, label in CURVES)]
    parts = [f"<h1>{html.escape(', '.join(names))}</h1>", "<h2>Last values</h2>"]
    parts.append(tabulate(last_values(rows), headers, tablefmt="html", floatfmt=".4g"))
    if len(names) > 1:
        table = tabulate(differing_settings(names), ["setting", *names], tablefmt="html")
        parts += ["<h2>What differs</h2>", table]
    for path in figures:
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">')
    head = f'<meta charset="utf-8"><title>{html.escape(", ".join(names))}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'
