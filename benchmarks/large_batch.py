"""Large batches: LAMB and AdamW on the same number of samples at several batch sizes, compared by held-out loss.

    python -m benchmarks.large_batch --data SHARDS --eval-data SHARDS --output DIR

You et al. (2020, section 4.1, table 4) claim that LAMB keeps its quality from batch 512 to 32k without tuning, if the
rate grows with the square root of the batch and the warm-up with the batch, while AdamW loses quality even when tuned.
Here both are tuned at every batch size, over rates that are scaled in this way from the smallest batch. "One rate" is
LAMB's best rate at the smallest batch, scaled but not tuned again. Each run is one `pretrain.train`, so a killed
study resumes where it stopped.
"""

import argparse
import math
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import parser, report
from data_prep.cli import run_cli
from data_prep.files import write_json
from data_prep.shards import Shards, unigram_entropy
from pretrain.metrics_file import read_metrics
from pretrain.model_config import PRESETS

WARMUP_OF_LARGEST = 1 / 5  # of the steps (You et al. 2020, table 4: 1/320 at batch 512, doubled with the batch)
DECAY = {"Lamb": 0.5, "AdamW": 1.0}  # degree of the polynomial, as in NVIDIA's recipe and in google-research/bert


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


def tuned(optimizer: str, batch_size: int, rates: list[float], args: argparse.Namespace) -> dict[float, float]:
    """{rate at the smallest batch: held-out loss}, best first; each rate is scaled by the square root of the batch."""
    scale = math.sqrt(batch_size / min(args.batches))
    losses = {rate: held_out_loss(optimizer, batch_size, rate * scale, args) for rate in rates}
    return dict(sorted(losses.items(), key=lambda pair: (math.isnan(pair[1]), pair[1])))


def held_out_loss(optimizer: str, batch_size: int, rate: float, args: argparse.Namespace) -> float:
    """Trains unless the run is finished, and returns its last held-out MLM loss; nan if the run diverged."""
    folder = args.output / f"{optimizer}-{batch_size}-{rate:.2g}"
    config = args.output / f"{folder.name}.json"
    write_json(config, deepspeed_config(optimizer, batch_size, rate, args))
    command = [sys.executable, "-m", "pretrain.train", "--model", args.model, "--data", args.data, "--dropout", "0"]
    command += ["--eval-data", args.eval_data, "--deepspeed_config", config, "--output", folder]
    every = str(args.samples // batch_size)
    command += ["--eval-interval", every, "--save-interval", every, "--keep-checkpoints", "1"]
    subprocess.run(list(map(str, command)), check=False)
    if (folder / "finished.json").exists():
        return read_metrics(folder, "eval")[-1]["mlm_loss"]
    if list(folder.glob("fault_step_*.json")):
        return math.nan
    raise OSError(f"{folder}: the run neither finished nor diverged, see above; the same command resumes it")


def plot(rows: list[dict], entropy: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in ("LAMB, one rate", "LAMB, tuned", "AdamW, tuned"):
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
    lists = {"batches": [64, 256, 1024, 4096], "lamb_rates": [3e-3, 1e-2], "adamw_rates": [3e-4, 1e-3, 3e-3]}
    for name, default in lists.items():
        flag, kind = f"--{name.replace('_', '-')}", type(default[0])
        options.add_argument(flag, type=kind, nargs="+", action="extend", help=f"default {' '.join(map(str, default))}")
    options.add_argument("--micro-batch", type=int, default=64, help="sequences at once (default 64)")
    args = options.parse_args(argv)
    for name, default in lists.items():  # a given option would extend argparse's own default
        setattr(args, name, getattr(args, name) or default)
    if uneven := [size for size in args.batches if args.samples % size]:
        raise ValueError(f"--samples {args.samples} is not a multiple of the batch size {uneven[0]}")
    args.output.mkdir(parents=True, exist_ok=True)
    rows, tuning, one_rate = [], [], None
    for batch_size in sorted(args.batches):
        lamb = tuned("Lamb", batch_size, args.lamb_rates, args)
        adamw = tuned("AdamW", batch_size, args.adamw_rates, args)
        one_rate = one_rate or next(iter(lamb))  # the best at the smallest batch
        row = {"batch": batch_size, "steps": args.samples // batch_size, "LAMB, one rate": lamb[one_rate]}
        row |= {f"{name}, tuned": next(iter(losses.values())) for name, losses in (("LAMB", lamb), ("AdamW", adamw))}
        rows.append(row)
        for name, losses in (("LAMB", lamb), ("AdamW", adamw)):
            tuning += [{"batch": batch_size, "optimizer": name, "rate": r, "loss": losses[r]} for r in sorted(losses)]
    entropy = unigram_entropy(Shards(args.eval_data))
    title = f"Held-out MLM loss of {args.model} after {args.samples:,} samples; unigram entropy {entropy:.3f} nat"
    report("large-batch", {title: rows, "Every run": tuning}, args.save)
    plot(rows, entropy, args.output / "large_batch.png")
    print(args.output / "large_batch.png")


if __name__ == "__main__":
    run_cli(main)
