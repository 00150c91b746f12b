"""How throughput grows with the number of ranks, measured here and predicted for clusters; and the time of a start.

    python -m benchmarks.scaling --data SHARDS --ranks 1 2

Strong scaling keeps the global batch constant, weak scaling the batch per rank. Every run is one `pretrain.train` under
torch's launcher with one thread per rank, and the runs take turns. The predictions are those of `pretrain.costs`
without overlap of computation and communication, beside what NVIDIA published for BERT-large on 256 A100
(DeepLearningExamples, BERT for PyTorch).
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import parser, report
from data_prep.cli import run_cli
from data_prep.files import write_json
from pretrain.costs import DEVICES, PlannedRun, step_seconds
from pretrain.deepspeed_config import load_deepspeed_config
from pretrain.metrics_file import read_metrics
from pretrain.model_config import PRESETS, load_model_config

NUM_STEPS = 12
PUBLISHED = {8: 4_556, 256: 138_294}  # sequences/s at 128 tokens; 8 GPUs: by the speed-up of 30.4 on 32 nodes
CLUSTERS = (  # to predict: model, DeepSpeed file, tensor parallel size, batch per replica
    ("large", "large_lamb_phase1.json", 1, 256),
    ("1.3b", "1.3b_tp_zero2.json", 2, 64),
    ("3.9b", "3.9b_tp_zero3_offload.json", 4, 64),
)
GPUS = (8, 32, 128, 256, 512, 1024, 4096)


def train(args, num_ranks: int, batch_size: int, folder: Path) -> dict[str, float]:
    """Trains once; returns sequences/s after the first steps, and the seconds of each part up to the first step."""
    config = folder.with_suffix(".json")
    write_json(config, {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": min(16, batch_size // num_ranks),
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "Lamb", "params": {"lr": 1e-3}},
        "scheduler": {"type": "WarmupPolynomialLR", "params": {"total_num_steps": NUM_STEPS}},
    })  # fmt: skip
    options = ["--model", args.model, "--data", args.data, "--deepspeed_config", config, "--output", folder]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", num_ranks, "--module"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.time()
    command = [sys.executable, "-m", *launcher, "pretrain.train", *options]
    subprocess.run(list(map(str, [*command, "--log-interval", 1, "--save-interval", NUM_STEPS])), env=environment,
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    rows = read_metrics(folder, "train")
    marks = [started, *((folder / name).stat().st_mtime for name in ("config.json", "launches.jsonl"))]
    first_step = rows[0]["step_ms"] / 1e3
    parts = ("imports, arguments, shards", "process groups, model, engine")
    seconds = {name: end - start for name, start, end in zip(parts, marks, marks[1:], strict=False)}
    speed = statistics.median(row["samples_per_s"] for row in rows[2:])
    return {"sequences/s": speed, **seconds, "the first step": first_step}


def measured(args) -> dict[str, list[dict]]:
    tables: dict[str, list[dict]] = {
        "Weak scaling": [],
        "Strong scaling": [],
        "From the launch to the first step, s": [],
    }
    with tempfile.TemporaryDirectory() as name:
        for title, batch_of in (("Weak scaling", lambda n: args.batch * n), ("Strong scaling", lambda n: args.batch)):
            runs: dict[int, list[dict]] = {num_ranks: [] for num_ranks in args.ranks}
            for turn in range(args.repeats):
                for num_ranks in args.ranks:
                    folder = Path(name, f"{title[:4]}-{num_ranks}-{turn}")
                    runs[num_ranks].append(train(args, num_ranks, batch_of(num_ranks), folder))
            speeds = {n: statistics.median(run["sequences/s"] for run in results) for n, results in runs.items()}
            base = speeds[args.ranks[0]] / args.ranks[0]
            tables[title] = [
                {"ranks": n, "batch": batch_of(n), "sequences/s": speed, "efficiency": speed / n / base}
                for n, speed in speeds.items()
            ]
            if title == "Weak scaling":
                for n, results in runs.items():
                    parts = {key: statistics.median(run[key] for run in results) for key in results[0]}
                    del parts["sequences/s"]
                    tables["From the launch to the first step, s"].append({"ranks": n, **parts})
    return tables


def predicted(device: str) -> list[dict]:
    """Sequences/s at 128 tokens and the efficiency relative to one node under weak scaling, by `pretrain.costs`."""
    rows = []
    for model, file, tp_size, batch in CLUSTERS:
        config = load_deepspeed_config(Path("ds_configs", file))
        base = None
        for num_gpus in GPUS:
            size = batch * (num_gpus // tp_size)
            sizes = {"train_batch_size": size, "train_micro_batch_size_per_gpu": 64}
            shape = (load_model_config(model, 30_522), config | sizes, num_gpus // 8, 8, tp_size, 128, 128.0, 20)
            speed = size / step_seconds(PlannedRun(*shape, DEVICES[device]))["step"]
            base = base or speed / num_gpus
            row = {"model": model, "GPUs": num_gpus, "sequences/s": round(speed), "efficiency": speed / num_gpus / base}
            known = PUBLISHED.get(num_gpus) if (model, device) == ("large", "a100-80g") else None
            rows.append({**row, "published": known, "predicted / published": known and speed / known})
    return rows


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--data", required=True, type=Path, help="folder of masked shards made by data_prep.build")
    options.add_argument("--model", default="tiny", choices=PRESETS, help="default: tiny")
    options.add_argument("--ranks", type=int, nargs="+", action="extend", help="default: 1 2")
    options.add_argument(
        "--batch", type=int, default=64, help="sequences per step, under weak scaling per rank and step (default 64)"
    )
    options.add_argument(
        "--device", default="a100-80g", choices=DEVICES, help="device to predict for (default a100-80g)"
    )
    args = options.parse_args(argv)
    args.ranks = args.ranks or [1, 2]  # a given --ranks would extend argparse's own default
    title = f"Predicted for {args.device}, 8 per node, sequences of 128, constant batch per replica"
    report("scaling", {**measured(args), title: predicted(args.device)}, args.save)


if __name__ == "__main__":
    run_cli(main)
