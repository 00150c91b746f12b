"""Large batches: the same number of samples at several batch sizes, LAMB against AdamW, held-out loss at the end.

    python -m benchmarks.large_batch --data SHARDS --eval-data SHARDS --output DIR

You et al. (2020) claim that LAMB keeps its quality from batch 512 to 32k with rates scaled by the square root of the
batch and a warm-up whose share grows with it (section 4.1, table 4), untuned, and that AdamW does not even where it is
tuned. Here LAMB has one rate, --lamb-rate at the smallest batch, scaled so; AdamW is tuned at each batch over
--adamw-rates, scaled likewise. Each run is one `pretrain.train`, so a killed study goes on where it was.
"""

import argparse
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import parser, report
from data_prep.cli import run_cli, write_json
from data_prep.shards import Shards, unigram_entropy
from pretrain.config import PRESETS
from pretrain.telemetry import read_metrics

WARMUP_OF_LARGEST = 1 / 5  # of the steps (You et al. 2020, table 4: 1/320 at batch 512, doubled with the batch)
DECAY = {"Lamb": 0.5, "AdamW": 1.0}  # degree of the polynomial, as NVIDIA and as google-research/bert have it


def deepspeed_config(optimizer: str, batch_size: int, rate: float, args: argparse.Namespace) -> dict:
    num_steps = args.samples // batch_size
    warmup = max(1, round(WARMUP_OF_LARGEST * batch_size / max(args.batches) * num_steps))
    return {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": min(batch_size, args.micro_batch),
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": optimizer, "params": {"lr": rate, "weight_decay": 0.01}},
        "scheduler": {
            "type": "WarmupPolynomialLR",
            "params": {"total_num_steps": num_steps, "warmup_num_steps": warmup, "degree": DECAY[optimizer]},
        },
    }


def runs(args: argparse.Namespace) -> Iterator[tuple[str, int, float, float]]:
    """(optimizer, batch size, rate at the smallest batch, rate scaled by the square root of the batch)."""
    for batch_size in args.batches:
        scale = math.sqrt(batch_size / min(args.batches))
        for optimizer, rates in (("Lamb", [args.lamb_rate]), ("AdamW", args.adamw_rates)):
            for rate in rates:
                yield optimizer, batch_size, rate, rate * scale


def held_out_loss(optimizer: str, batch_size: int, rate: float, args: argparse.Namespace) -> float:
    """Trains, unless that is done, and returns the held-out MLM loss of the last step; nan for a run that diverged."""
    folder = args.output / f"{optimizer}-{batch_size}-{rate:.2g}"
    config = args.output / f"{folder.name}.json"
    write_json(config, deepspeed_config(optimizer, batch_size, rate, args))
    command = [sys.executable, "-m", "pretrain.train", "--model", args.model, "--data", args.data, "--dropout", "0"]
    command += ["--eval-data", args.eval_data, "--deepspeed_config", config, "--output", folder]
    every = str(args.samples // batch_size)
    command += ["--eval-interval", every, "--save-interval", every, "--keep-checkpoints", "1"]
    subprocess.run(list(map(str, command)), check=False)
    rows = read_metrics(folder, "eval")
    return rows[-1]["mlm_loss"] if rows else math.nan


def plot(rows: list[dict], entropy: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in ("LAMB, one rate", "AdamW, tuned"):
        axes.plot([row["batch"] for row in rows], [row[name] for row in rows], marker="o", label=name)
    axes.axhline(entropy, color="grey", linestyle=":", label="unigram entropy")
    axes.set(xscale="log", xlabel="batch (sequences)", ylabel="held-out MLM loss (nat)")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--data", required=True, type=Path, help="folder of masked shards made by data_prep.build")
    options.add_argument("--eval-data", required=True, type=Path, help="shards of held-out text")
    options.add_argument("--output", required=True, type=Path, help="folder for the runs and the plot")
    options.add_argument("--model", default="tiny", choices=PRESETS, help="default: tiny")
    options.add_argument("--samples", type=int, default=131_072, help="sequences of each run (default 131072)")
    options.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024, 4096], help="batch sizes")
    options.add_argument("--micro-batch", type=int, default=64, help="sequences at once (default 64)")
    options.add_argument("--lamb-rate", type=float, default=3e-3, help="of LAMB at the smallest batch (default 3e-3)")
    options.add_argument(
        "--adamw-rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3], help="of AdamW at the smallest batch"
    )
    args = options.parse_args(argv)
    if uneven := [size for size in args.batches if args.samples % size]:
        raise ValueError(f"--samples {args.samples} is no multiple of batch {uneven[0]}")
    args.output.mkdir(parents=True, exist_ok=True)
    losses: dict[tuple[str, int], dict[float, float]] = {}
    for optimizer, batch_size, rate, scaled in runs(args):
        losses.setdefault((optimizer, batch_size), {})[rate] = held_out_loss(optimizer, batch_size, scaled, args)
    rows, tuning = [], []
    for batch_size in args.batches:
        adamw = losses["AdamW", batch_size]
        best = min(adamw, key=lambda rate: (math.isnan(adamw[rate]), adamw[rate]))
        steps = args.samples // batch_size
        row = {"batch": batch_size, "steps": steps, "LAMB, one rate": losses["Lamb", batch_size][args.lamb_rate]}
        rows.append({**row, "AdamW, tuned": adamw[best], "AdamW's rate": best})
        tuning.append({"batch": batch_size, **{f"AdamW {rate:.2g}": loss for rate, loss in adamw.items()}})
    entropy = unigram_entropy(Shards(args.eval_data))
    title = f"Held-out MLM loss of {args.model} after {args.samples:,} samples; unigram entropy {entropy:.3f} nat"
    report("large-batch", {title: rows, "AdamW's tuning": tuning}, args.save)
    plot(rows, entropy, args.output / "large_batch.png")
    print(args.output / "large_batch.png")


if __name__ == "__main__":
    run_cli(main)
