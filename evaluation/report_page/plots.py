"""The report's figures, as SVG data URIs: curves of pretraining runs, and scores by start, epoch, seed and type."""

import base64
import io
import itertools
import statistics
from collections.abc import Callable, Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from evaluation.run_folder import scores_of

# The palette of Okabe and Ito, whose colours can be distinguished with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
START_COLOURS = {"pretrained": "#0072B2", "random": "#D55E00", "ngram": "#009E73", "majority": "#8A8F98"}
INK = "#1c2330"
STYLE = {
    **{"font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left"},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa1ac", "axes.grid": True},
    **{"grid.color": "#e6e8ec", "axes.axisbelow": True, "text.color": INK, "axes.labelcolor": "#4a5261"},
    **{"xtick.color": "#4a5261", "ytick.color": "#4a5261", "legend.frameon": False, "legend.fontsize": 9},
    **{"lines.linewidth": 1.6, "figure.constrained_layout.use": True, "svg.hashsalt": "report"},
}
WIDTH = 4.2  # inches, so that 10 points are 10 pixels on a phone, where a figure is 330 pixels wide
Curves = dict[str, list[dict]]  # a pretraining run's name -> the rows of its metrics.jsonl


def _figure(draw: Callable[[Axes], None], height: float = 2.9) -> str:
    """A figure filled by `draw`, as a data URI. The same content gives the same bytes."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, height))
        draw(axes)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def _series(rows: Sequence[dict], kind: str, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one quantity, from the rows of one kind that have it."""
    chosen = [row for row in rows if row["kind"] == kind and key in row]
    return [row["step"] for row in chosen], [row[key] for row in chosen]


def _has(runs: Curves, kind: str, key: str) -> bool:
    return any(row["kind"] == kind and key in row for rows in runs.values() for row in rows)


def loss_curves(runs: Curves) -> str:
    """Masked-LM loss by step, training and held out, and the unigram entropy: the loss of token frequencies alone."""

    def draw(axes: Axes) -> None:
        for (name, rows), colour in zip(runs.items(), itertools.cycle(COLOURS), strict=False):
            axes.plot(*_series(rows, "train", "mlm_loss"), color=colour, alpha=0.45, label=f"{name}, training")
            axes.plot(*_series(rows, "eval", "mlm_loss"), "o-", color=colour, ms=4, label=f"{name}, held out")
        entropies = {row["unigram_entropy"] for rows in runs.values() for row in rows if row.get("unigram_entropy")}
        for entropy in sorted(entropies):
            axes.axhline(entropy, color=INK, lw=1.2, ls="--", label=f"unigram entropy {entropy:.2f}")
        axes.set(title="Masked-LM loss (nats)", xlabel="step")
        axes.legend()

    return _figure(draw)


def curves(runs: Curves, kind: str, key: str, title: str) -> str | None:
    """The quantity `key` of the rows of one `kind` by step, one line per run; None if no row has it."""
    if not _has(runs, kind, key):
        return None

    def draw(axes: Axes) -> None:
        for (name, rows), colour in zip(runs.items(), itertools.cycle(COLOURS), strict=False):
            steps, values = _series(rows, kind, key)
            axes.plot(steps, values, color=colour, label=name, marker="." if len(steps) < 20 else "")
        axes.set(title=title, xlabel="step")
        axes.set_ylim(bottom=0)
        if len(runs) > 1:
            axes.legend()

    return _figure(draw)


def trust_ratios(runs: Curves) -> str | None:
    """LAMB's trust ratios by step: median over tensors, and a band from minimum to maximum; None without LAMB."""
    if not _has(runs, "train", "trust_ratio_median"):
        return None

    def draw(axes: Axes) -> None:
        for (name, rows), colour in zip(runs.items(), itertools.cycle(COLOURS), strict=False):
            steps, low = _series(rows, "train", "trust_ratio_min")
            _, high = _series(rows, "train", "trust_ratio_max")
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
            axes.plot(*_series(rows, "train", "trust_ratio_median"), color=colour, label=name)
        axes.set(title="LAMB trust ratio: median, least to greatest", xlabel="step", yscale="log")

    return _figure(draw)


def scores_by_start(runs: Sequence[dict], metric: str, published: tuple[str, float] | None) -> str:
    """Last-epoch dev `metric` by run: a dot for each seed, a bar at the mean, a line at `published`."""

    def draw(axes: Axes) -> None:
        for place, run in enumerate(runs):
            colour = START_COLOURS[run["start"]]
            values = [_percent(scores_of(seed, "last")[metric]) for seed in run["seeds"]]
            mean = _percent(run["last"][metric]["mean"])
            axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.6, ms=7, mec="white")
            axes.plot([mean, mean], [place - 0.28, place + 0.28], color=colour, lw=2.5)
            axes.annotate(f"{mean:.1f}", (mean, place - 0.3), ha="center", va="bottom", fontsize=9)
        if published:
            axes.axvline(published[1], color=INK, lw=1.2, ls="--", label=published[0])
            axes.legend()
        axes.set_yticks(range(len(runs)), [run["label"] for run in runs])
        axes.set(title=f"Dev {metric}, last epoch (%)", ylim=(len(runs) - 0.4, -0.75))
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.12)

    return _figure(draw, height=1.2 + 0.5 * len(runs))


def scores_by_epoch(runs: Sequence[dict], metric: str) -> str | None:
    """Dev `metric` after each epoch, one thin line per seed; None if no run has several epochs."""
    chosen = [run for run in runs if len(run["seeds"][0]["epochs"]) > 1]
    if not chosen:
        return None

    def draw(axes: Axes) -> None:
        for run in chosen:
            style = {"color": START_COLOURS[run["start"]], "ms": 3.5, "lw": 1.2, "alpha": 0.8}
            for index, seed in enumerate(run["seeds"]):
                epochs = [row["epoch"] for row in seed["epochs"]]
                values = [_percent(row["scores"][metric]) for row in seed["epochs"]]
                axes.plot(epochs, values, "o-", label=run["label"] if index == 0 else None, **style)
        axes.set(title=f"Dev {metric} by epoch (%), one line per seed", xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()

    return _figure(draw, height=max(2.4, 1.2 + 0.5 * len(runs)))


def scores_by_type(runs: Sequence[dict], names: Sequence[str]) -> str | None:
    """Last-epoch means of the scores `names`, such as F1 by entity type: one dot per start; None without names."""
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


def _percent(value: float | None) -> float:
    return float("nan") if value is None else 100 * value
