"""A whole training step under DeepSpeed, in turn: of our model, of transformers' `BertForPreTraining` with SDPA, plain
and compiled, and of megatron-core's `BertModel`. Same sizes, batches, DeepSpeed file and optimizer.

    python -m benchmarks.step --data SHARDS --model base --micro-batch 8                    on a CPU
    python -m benchmarks.step --data SHARDS --model large --micro-batch 256 --bf16          one GPU
    python -m benchmarks.step --full 128 --model large --micro-batch 256 --bf16 --profile   full sequences, and kernels

MFU counts the matrix products that real tokens and masked positions need (`ModelConfig.training_flops`), against the
data sheet's peak of a GPU or the measured speed of a large product on a CPU. "Own floor" is the least time for what a
model itself computes, including padding and predictions at all positions: its products at that peak, then the
optimizer's bytes at the measured speed of a copy. Batches are padded to their longest sequence. For the compiled model
they are padded to the longest of the shards, so that it sees one shape.
"""

from pathlib import Path

import numpy as np
import torch

from benchmarks.competitors import COMPILED, MEGATRON, OURS, PLAIN, Competitor, Job
from benchmarks.measure import copy_bandwidth, parser, report
from data_prep.cli import run_cli
from data_prep.shards import Shards
from pretrain.data import make_batch, pack_sequences
from pretrain.model import PretrainingBatch
from pretrain.model_config import PRESETS, RECOMPUTE, ModelConfig, load_model_config
from pretrain.parameter_table import num_parameters
from pretrain.telemetry import peak_flops

OPTIMIZER_BYTES = {"Lamb": 40, "AdamW": 28}  # minimum per parameter; LAMB reads a whole tensor before it updates it
PEERS = {"transformers": PLAIN, "compiled": COMPILED, "megatron": MEGATRON}  # as --against names them
TOLERANCE = 1e-4  # for the first losses, which agree within 1e-6


def full_batch(config: ModelConfig, length: int, size: int, seed: int) -> PretrainingBatch:
    """`size` sequences of exactly `length` random tokens, with 20 predictions per 128 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = np.full(size, length)
    token_ids = torch.randint(config.vocab_size, (size * length,), generator=generator)
    places = torch.arange(round(20 * length / 128)) * (length // round(20 * length / 128))
    rows = (torch.arange(size)[:, None] * length + places).flatten()
    return PretrainingBatch(
        sequences=pack_sequences(token_ids.numpy(), lengths, lengths // 2),
        masked_lm_rows=rows,
        masked_lm_labels=torch.randint(config.vocab_size, rows.shape, generator=generator),
        pair_labels=torch.randint(2, (size,), generator=generator),
    )


def make_batches(config: ModelConfig, args) -> list[PretrainingBatch]:
    """A batch for each step of a turn."""
    if args.full:
        return [full_batch(config, args.full, args.micro_batch, seed) for seed in range(args.steps)]
    shards, starts = Shards(args.data), np.arange(args.steps) * args.micro_batch
    return [make_batch(shards.gather(np.arange(start, start + args.micro_batch))) for start in starts]


def make_job(config: ModelConfig, args) -> Job:
    deepspeed = {
        "train_batch_size": args.micro_batch,
        "train_micro_batch_size_per_gpu": args.micro_batch,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": args.bf16},
        "zero_optimization": {"stage": args.zero},
        "optimizer": {"type": args.optimizer, "params": {"lr": 1e-4}},
        "scheduler": {"type": "WarmupPolynomialLR", "params": {"total_num_steps": 10**6}},
    }
    length = args.full or Shards(args.data).manifest["config"]["seq_length"]
    return Job(config, make_batches(config, args), deepspeed, length, args.recompute)


def flops_of(job: Job, name: str = OURS) -> float:
    """FLOPs of a step's matrix products as the model `name` computes them. Ours computes only those that are needed."""
    found = []
    for batch in job.batches:
        lengths, num_predictions = torch.diff(batch.sequences.cu_seqlens).tolist(), len(batch.masked_lm_labels)
        if name != OURS:
            lengths = [job.length if name == COMPILED else max(lengths)] * len(lengths)
            num_predictions = sum(lengths)
        found.append(job.config.training_flops(lengths, num_predictions))
    return float(np.mean(found))


def measure(job: Job, names: list[str], args) -> dict[str, list[dict]]:
    """The table of the competitors, and with --profile a table of our slowest kernels."""
    competitors = [Competitor(name, job) for name in names]
    losses = {competitor.name: competitor.ask("first_loss") for competitor in competitors}
    equal = [loss for name, loss in losses.items() if name != MEGATRON]
    if max(equal) - min(equal) > TOLERANCE:
        raise RuntimeError(f"the first losses differ, so it is not the same work: {losses}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peak = bandwidth = 0.0
    for turn in range(args.repeats + 1):  # the first warms up
        peak, bandwidth = max(peak, peak_flops(device)), max(bandwidth, copy_bandwidth(device))
        for competitor in competitors:
            result = competitor.ask("turn")
            if turn:
                seconds[competitor.name].append(result)
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    size = np.mean([len(batch.pair_labels) for batch in job.batches])
    num_tokens = np.mean([len(batch.sequences.token_ids) for batch in job.batches])
    moved_s = OPTIMIZER_BYTES[args.optimizer] * num_parameters(job.config) / bandwidth
    rows = []
    for competitor in competitors:
        name, s = competitor.name, medians[competitor.name]
        row = {"what": name, "ms": 1e3 * s, "time / ours": s / medians[OURS], "sequences/s": size / s}
        row |= {
            "real tokens/s": num_tokens / s,
            "MFU": flops_of(job) / s / peak,
            "peak GiB": competitor.ask("peak_gib"),
        }
        floor_s = flops_of(job, name) / peak + moved_s
        rows.append({**row, "first loss": losses[name], "own floor, ms": 1e3 * floor_s})
    floor = {"what": "floor: these products, then these bytes", "ms": rows[0]["own floor, ms"]}
    tables = {f"One step, peak {peak / 1e12:.3g} TFLOP/s, copy {bandwidth / 1e9:.3g} GB/s": [*rows, floor]}
    if args.profile:
        tables["Longest in our step"] = competitors[0].ask("kernels")
    for competitor in competitors:
        competitor.stop()
    return tables


def largest_micro_batch(config: ModelConfig, args) -> list[dict]:
    """Our sequences/s while the micro-batch is doubled until the GPU's memory is full."""
    args.profile, rows = False, []
    while True:
        args.micro_batch *= 2
        try:
            row = next(iter(measure(make_job(config, args), [OURS], args).values()))[0]
        except OSError as error:
            if "OutOfMemoryError" not in str(error):
                raise
            return rows
        rows.append({"micro-batch": args.micro_batch, **row})


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    data = options.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", type=Path, help="folder of masked shards made by data_prep.build")
    data.add_argument("--full", type=int, metavar="LENGTH", help="random sequences of exactly this length instead")
    options.add_argument("--model", default="base", choices=PRESETS, help="default: base")
    options.add_argument("--layers", type=int, help="fewer layers than the model has, where memory is short")
    options.add_argument("--micro-batch", type=int, default=8, help="sequences per step (default 8)")
    options.add_argument("--steps", type=int, default=2, help="steps per turn, each with its own batch (default 2)")
    options.add_argument("--zero", type=int, default=1, choices=range(4), help="stage (default 1)")
    options.add_argument("--optimizer", default="Lamb", choices=("Lamb", "AdamW"), help="default Lamb")
    options.add_argument("--recompute", default="none", choices=RECOMPUTE, help="recomputation in our model")
    options.add_argument("--bf16", action="store_true")
    options.add_argument("--against", nargs="*", action="extend", choices=PEERS, help="peers (default: all)")
    options.add_argument("--profile", action="store_true", help="what takes longest in our step")
    options.add_argument("--largest", action="store_true", help="on a GPU: how far the micro-batch can be doubled")
    args = options.parse_args(argv)
    if args.largest and not torch.cuda.is_available():
        raise ValueError("--largest fills a GPU's memory, and there is no GPU here")
    if args.data and Shards(args.data).manifest["config"]["pair_task"] == "none":
        raise ValueError(f"{args.data} has no sentence pairs, which the peers' losses need; build with --pair-task nsp")
    values = vars(load_model_config(args.model, 30_522 if args.full else Shards(args.data).manifest["vocab"]["size"]))
    config = ModelConfig(**{**values, "num_hidden_layers": args.layers or values["num_hidden_layers"]})
    job = make_job(config, args)
    text = f"full sequences of {args.full}" if args.full else f"real text of up to {job.length} tokens"
    title = (
        f"{args.model}, {config.num_hidden_layers} layers, {text}, micro-batch {args.micro_batch}, {args.optimizer},"
    )
    title += f" ZeRO {args.zero}, {'bf16' if args.bf16 else 'fp32'}"
    tables = measure(job, [OURS, *(PEERS[name] for name in (PEERS if args.against is None else args.against))], args)
    tables = {f"{name}: {title}": rows for name, rows in tables.items()}
    if args.largest:
        tables[f"Doubled micro-batches: {title}"] = largest_micro_batch(config, args)
    report(f"step-{args.model}-{'full-' if args.full else ''}{job.length}", tables, args.save)


if __name__ == "__main__":
    run_cli(main)
