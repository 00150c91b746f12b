"""Times every stage from text to a fine-tuned model beside its floor, in one run of two minutes.

    python -m benchmarks.floors --text TEXT --vocab FILE --data SHARDS

The floor of a stage is the least time that this machine could need for it. For a stage that computes, it is the time of
its matrix products at the speed of a large product; for any other, the time to read and write its bytes at the speed of
a large copy. Data preparation and the loader run on one core, the other stages on all cores.
"""

import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.data_prep import Bench, size_on_disk
from benchmarks.measure import copy_bandwidth, in_turn, parser, report
from benchmarks.step import OPTIMIZER_BYTES
from data_prep.cli import run_cli
from data_prep.shards import Shards
from evaluation.tasks.heads import BertForSequenceClassification
from pretrain.data import make_batch, read_records, samples_at
from pretrain.lamb import Lamb, param_groups
from pretrain.layout import Layout, init_layout
from pretrain.model import BertForPreTraining, PretrainingBatch, init_weights
from pretrain.model_config import PRESETS, ModelConfig, load_model_config
from pretrain.parameter_table import num_parameters
from pretrain.telemetry import peak_flops

NUM_SAMPLES = 8192  # read by the loader per round
NUM_RANKS = 2
CPU = torch.device("cpu")


def row(stage: str, work: str, seconds: float, floor_s: float) -> dict:
    share = {"share of the floor's speed, %": 100 * floor_s / seconds}
    return {"stage": stage, "work": work, "ms": 1e3 * seconds, "floor, ms": 1e3 * floor_s, **share}


def data_stages(text: Path, vocab: str, repeats: int, bandwidth: float) -> list[dict]:
    """Text to corpus to shards of 128 tokens in one process: medians over `repeats` rounds, after one that compiles."""
    with tempfile.TemporaryDirectory() as folder:
        bench, found = Bench(Path(folder), vocab), []
        for _ in range(repeats + 1):
            corpus_s, corpus = bench.tokenise(text, "jsonl")
            shards_s, shards = bench.shard(corpus)
            found.append((corpus_s, shards_s))
        corpus_s, shards_s = np.median(found[1:], axis=0)
        megabytes, corpus_mb, shards_mb = text.stat().st_size / 1e6, size_on_disk(corpus), size_on_disk(shards)
    return [
        row("text to corpus", f"{megabytes:.0f} MB of text", corpus_s, (megabytes + corpus_mb) * 1e6 / bandwidth),
        row("corpus to shards", f"{shards_mb:.0f} MB of shards", shards_s, (corpus_mb + shards_mb) * 1e6 / bandwidth),
    ]


def loader(shards: Shards, micro_batch: int, repeats: int, bandwidth: float) -> dict:
    """The loader with stored masks, in micro-batches."""
    parts = np.split(samples_at(0, 0, NUM_SAMPLES, shards.num_sequences), NUM_SAMPLES // micro_batch)
    seconds = in_turn({"read": lambda: [make_batch(read_records(shards, part)) for part in parts]}, repeats)["read"]
    records = read_records(shards, parts[0])
    read = sum(values.nbytes for values in vars(records).values() if isinstance(values, np.ndarray))
    made = batch_bytes(make_batch(records))
    return row(
        "loader", f"{NUM_SAMPLES:,} sequences", float(np.median(seconds)), len(parts) * (read + made) / bandwidth
    )


def batch_bytes(batch: PretrainingBatch) -> int:
    tensors = [*vars(batch.sequences).values(), *vars(batch).values()]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def training(config: ModelConfig, batch: PretrainingBatch, layout: Layout, repeats: int, bandwidth: float) -> list:
    """Forward and backward of pretraining with dropout, then the step of LAMB on their gradients."""
    module = BertForPreTraining(config, layout)
    init_weights(module, seed=0)
    # Without an engine LAMB accepts only whole tensors, but the module marks its tensors as slices even on one rank.
    whole = torch.nn.ParameterList(torch.nn.Parameter(parameter.detach()) for parameter in module.parameters())
    optimizer = Lamb(param_groups(whole, 0.01), lr=1e-4)

    def forward_backward() -> None:
        module.zero_grad()
        mlm_loss, _, pair_loss, _ = module(batch, (0, 0, 0, 0))
        (mlm_loss.mean() + pair_loss.mean()).backward()

    def step() -> None:
        for mine, parameter in zip(whole, module.parameters(), strict=True):
            mine.grad = parameter.grad
        optimizer.step()

    seconds = in_turn({"passes": forward_backward, "step": step}, repeats)
    lengths = torch.diff(batch.sequences.cu_seqlens).tolist()
    flops = config.training_flops(lengths, len(batch.masked_lm_labels))
    size, count = f"{len(lengths)} sequences, {sum(lengths)} tokens", num_parameters(config)
    floor_s = OPTIMIZER_BYTES["Lamb"] * count / bandwidth
    return [
        row("forward and backward", size, float(np.median(seconds["passes"])), flops / peak_flops(CPU)),
        row("LAMB's step", f"{count / 1e6:.0f} M parameters", float(np.median(seconds["step"])), floor_s),
    ]


def scoring(config: ModelConfig, batch: PretrainingBatch, layout: Layout, repeats: int) -> list[dict]:
    """Forward and backward of fine-tuning on sentence pairs, and prediction."""
    module = BertForSequenceClassification(config, layout, 2)
    init_weights(module, seed=0)

    def fine_tune() -> None:
        module.zero_grad()
        module(batch.sequences, (0, 0, 0, 0)).logsumexp(-1).mean().backward()

    @torch.no_grad()
    def predict() -> None:
        module(batch.sequences)

    seconds = in_turn({"fine-tuning": fine_tune, "prediction": predict}, repeats)
    lengths = torch.diff(batch.sequences.cu_seqlens).tolist()
    flops = config.training_flops(lengths, 0)
    size, peak = f"{len(lengths)} sequences, {sum(lengths)} tokens", peak_flops(CPU)
    floors = {"fine-tuning": flops / peak, "prediction": flops / 3 / peak}
    return [row(name, size, float(np.median(seconds[name])), floor_s) for name, floor_s in floors.items()]


def all_reduce(rank: int, store: str, count: int, repeats: int, result: str) -> None:
    """One of NUM_RANKS processes: times an all-reduce of `count` float32 gradients; rank 0 writes the median."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=NUM_RANKS)
    torch.set_num_threads(1)
    gradients, seconds = torch.zeros(count), []
    for _ in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(gradients)
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        Path(result).write_text(str(np.median(seconds[1:])))
    dist.destroy_process_group()


def communication(config: ModelConfig, repeats: int, bandwidth: float) -> dict:
    """Sums gradients over the ranks of this machine. On a ring each rank sends 2 n (r - 1) / r bytes; the sender reads
    them and the receiver writes them.
    """
    count = num_parameters(config)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "seconds")
        torch.multiprocessing.spawn(all_reduce, (f"{folder}/store", count, repeats, str(result)), NUM_RANKS)
        seconds = float(result.read_text())
    moved = 2 * NUM_RANKS * math.ceil(2 * 4 * count * (NUM_RANKS - 1) / NUM_RANKS)
    return row("communication", f"gradients of {NUM_RANKS} ranks", seconds, moved / bandwidth)


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--text", required=True, type=Path, help="a JSONL file of documents")
    options.add_argument("--vocab", required=True, metavar="FILE", help="a WordPiece vocab.txt")
    options.add_argument("--data", required=True, type=Path, help="folder of masked shards made by data_prep.build")
    options.add_argument("--model", default="base", choices=PRESETS, help="default: base")
    options.add_argument("--micro-batch", type=int, default=8, help="sequences at once (default 8)")
    args = options.parse_args(argv)
    shards, layout = Shards(args.data), init_layout()
    config = load_model_config(args.model, shards.manifest["vocab"]["size"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one_core = copy_bandwidth(CPU)
    rows = data_stages(args.text, args.vocab, args.repeats, one_core)
    rows.append(loader(shards, 32, args.repeats, one_core))
    torch.set_num_threads(threads)
    bandwidth, batch = copy_bandwidth(CPU), make_batch(read_records(shards, np.arange(args.micro_batch)))
    rows += training(config, batch, layout, args.repeats, bandwidth)
    rows.append(communication(config, args.repeats, bandwidth))
    rows += scoring(config, batch, layout, args.repeats)
    title = f"Every stage against its floor, {args.model}, sequences of up to {shards.manifest['config']['seq_length']}"
    report("floors", {f"{title}, copy {bandwidth / 1e9:.3g} GB/s, of one core {one_core / 1e9:.3g}": rows}, args.save)


if __name__ == "__main__":
    run_cli(main)
