"""The report's figures, each an SVG that goes into the page as it is: curves of pretraining runs, scores by start,
epoch, seed and type.
"""

import base64
import io
import statistics
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from evaluation.run_folder import scores_of

# Okabe and Ito's palette, told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
START_COLOURS = {"pretrained": "#0072B2", "random": "#D55E00", "ngram": "#009E73", "majority": "#8A8F98"}
STYLE = {
    **{"font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left"},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa1ac", "axes.grid": True},
    **{"grid.color": "#e6e8ec", "axes.axisbelow": True, "text.color": "#1c2330", "axes.labelcolor": "#4a5261"},
    **{"xtick.color": "#4a5261", "ytick.color": "#4a5261", "legend.frameon": False, "legend.fontsize": 9},
    **{"lines.linewidth": 1.6, "figure.constrained_layout.use": True, "svg.hashsalt": "report"},
}
WIDTH = 4.2  # inches, so that letters of 10 points are 10 pixels on a phone, where a figure is 330 pixels wide
Curves = dict[str, list[dict]]  # a pretraining run's name -> the rows of its metrics.jsonl


def _figure(draw, height: float = 2.9) -> str:
    """Let `draw(axes)` fill a figure; the figure as a data URI, the same bytes for the same content."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, height))
        draw(axes)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def loss_curves(runs: Curves) -> str:
    """Masked-LM loss by step, in training and held out, over the held-out unigram entropy: what knowing word counts
    alone gives.
    """

    def draw(axes: Axes) -> None:
        for (name, rows), colour in zip(runs.items(), _cycle(len(runs)), strict=True):
            train = [row for row in rows if row["kind"] == "train"]
            held_out = [row for row in rows if row["kind"] == "eval"]
            axes.plot(
                _steps(train), [row["mlm_loss"] for row in train], color=colour, alpha=0.45, label=f"{name}, training"
            )
            axes.plot(
                _steps(held_out),
                [row["mlm_loss"] for row in held_out],
                "o-",
                color=colour,
                ms=4,
                label=f"{name}, held out",
            )
        entropies = {row["unigram_entropy"] for rows in runs.values() for row in rows if row.get("unigram_entropy")}
        for entropy in sorted(entropies):
            axes.axhline(entropy, color="#1c2330", lw=1.2, ls="--", label=f"unigram entropy {entropy:.2f}")
        axes.set(title="Masked-LM loss (nats)", xlabel="step")
        axes.legend()

    return _figure(draw)


def curves(runs: Curves, key: str, title: str) -> str | None:
    """One quantity of the training rows by step, a line a run; None if no row has it."""
    chosen = {name: [row for row in rows if row["kind"] == "train" and key in row] for name, rows in runs.items()}
    if not any(chosen.values()):
        return None

    def draw(axes: Axes) -> None:
        for (name, rows), colour in zip(chosen.items(), _cycle(len(chosen)), strict=True):
            axes.plot(_steps(rows), [row[key] for row in rows], color=colour, label=name)
        axes.set(title=title, xlabel="step")
        axes.set_ylim(bottom=0)
        if len(chosen) > 1:
            axes.legend()

    return _figure(draw)


def trust_ratios(runs: Curves) -> str | None:
    """LAMB's trust ratios by step on a logarithmic scale: the median over tensors in the band of all; None without
    LAMB.
    """
    chosen = {name: [row for row in rows if "trust_ratio_median" in row] for name, rows in runs.items()}
    if not any(chosen.values()):
        return None

    def draw(axes: Axes) -> None:
        for (name, rows), colour in zip(chosen.items(), _cycle(len(chosen)), strict=True):
            low, middle, high = ([row[f"trust_ratio_{part}"] for row in rows] for part in ("min", "median", "max"))
            axes.fill_between(_steps(rows), low, high, color=colour, alpha=0.15, lw=0)
            axes.plot(_steps(rows), middle, color=colour, label=name)
        axes.set(title="LAMB trust ratio: median, least to greatest", xlabel="step", yscale="log")

    return _figure(draw)


def scores_by_start(runs: Sequence[dict], metric: str, published: tuple[str, float] | None) -> str:
    """The last epoch's dev `metric` of each results.json: a dot a seed, a bar at their mean; a line at what was
    published, (whose, percent).
    """

    def draw(axes: Axes) -> None:
        for place, run in enumerate(runs):
            colour = START_COLOURS[run["start"]]
            values = [_percent(scores_of(seed, "last")[metric]) for seed in run["seeds"]]
            mean = _percent(run["last"][metric]["mean"])
            axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.6, ms=7, mec="white")
            axes.plot([mean, mean], [place - 0.28, place + 0.28], color=colour, lw=2.5)
            axes.annotate(f"{mean:.1f}", (mean, place - 0.3), ha="center", va="bottom", fontsize=9)
        if published:
            axes.axvline(published[1], color="#1c2330", lw=1.2, ls="--", label=published[0])
            axes.legend()
        axes.set_yticks(range(len(runs)), [run["label"] for run in runs])
        axes.set(title=f"Dev {metric}, last epoch (%)", ylim=(len(runs) - 0.4, -0.75))
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.12)

    return _figure(draw, height=1.2 + 0.5 * len(runs))


def scores_by_epoch(runs: Sequence[dict], metric: str) -> str | None:
    """Dev `metric` after each epoch, a thin line a seed; None if no run has several epochs."""
    chosen = [run for run in runs if len(run["seeds"][0]["epochs"]) > 1]
    if not chosen:
        return None

    def draw(axes: Axes) -> None:
        for run in chosen:
            for index, seed in enumerate(run["seeds"]):
                epochs = [row["epoch"] for row in seed["epochs"]]
                values = [_percent(row["scores"][metric]) for row in seed["epochs"]]
                label = run["label"] if index == 0 else None
                axes.plot(
                    epochs, values, "o-", ms=3.5, lw=1.2, alpha=0.8, color=START_COLOURS[run["start"]], label=label
                )
        axes.set(title=f"Dev {metric} by epoch (%), a line a seed", xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()

    return _figure(draw, height=max(2.4, 1.2 + 0.5 * len(runs)))


def scores_by_type(runs: Sequence[dict], names: Sequence[str]) -> str | None:
    """Means over seeds of the scores `names` (by question word, by type of entity) after the last epoch, a dot a start;
    None without names.
    """
    if not names:
        return None

    def draw(axes: Axes) -> None:
        for run in runs:
            seeds = [scores_of(seed, "last") for seed in run["seeds"]]
            means = [statistics.fmean(_percent(scores.get(name)) for scores in seeds) for name in names]
            axes.plot(means, range(len(names)), "o", color=START_COLOURS[run["start"]], ms=5, label=run["label"])
        axes.set_yticks(range(len(names)), names)
        axes.set(title="Dev scores by type, last epoch (%)", ylim=(len(names) - 0.5, -0.5))
        axes.legend()

    return _figure(draw, height=1 + 0.24 * len(names))


def _steps(rows: Sequence[dict]) -> list[int]:
    return [row["step"] for row in rows]


def _cycle(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _percent(value: float | None) -> float:
    return float("nan") if value is None else 100 * value
