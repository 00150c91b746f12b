"""A whole training step under DeepSpeed, of our model and of transformers' with SDPA, plain and compiled, in turn: same
sizes, same batches, same DeepSpeed file, same optimizer.

    python -m benchmarks.step --data SHARDS --model large --micro-batch 256 --bf16          one GPU
    python -m benchmarks.step --full 128 --model large --micro-batch 256 --bf16 --profile   full sequences, and kernels

MFU counts the matrix products that real tokens and masked positions need (`ModelConfig.training_flops`), against the
data sheet's peak of a GPU or the measured speed of a large product on a CPU. transformers' model gets its batches
padded to the longest sequence of the shards, so that compiling sees one shape.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig
from transformers import BertForPreTraining as HuggingFaceBert

from benchmarks.measure import parser, report
from benchmarks.model import padded
from data_prep.cli import run_cli
from data_prep.shards import Shards
from pretrain.config import PRESETS, ModelConfig, load_model_config
from pretrain.data import make_batch, pack_sequences
from pretrain.engine import initialize_engine
from pretrain.layout import Layout, init_layout
from pretrain.model import BertForPreTraining, PretrainingBatch, init_weights
from pretrain.telemetry import peak_flops

NUM_BATCHES = 4  # different ones, gone through again and again
NUM_KERNELS = 10


def full_batch(config: ModelConfig, length: int, size: int, seed: int) -> PretrainingBatch:
    """Random tokens: `size` sequences of exactly `length`, with 20 predictions for each 128 of it."""
    generator = torch.Generator().manual_seed(seed)
    lengths = np.full(size, length)
    token_ids = torch.randint(config.vocab_size, (size * length,), generator=generator)
    places = torch.arange(round(20 * length / 128)) * (length // round(20 * length / 128))
    positions = (torch.arange(size)[:, None] * length + places).flatten()
    return PretrainingBatch(
        sequences=pack_sequences(token_ids.numpy(), lengths, lengths // 2),
        masked_lm_positions=positions,
        masked_lm_labels=torch.randint(config.vocab_size, positions.shape, generator=generator),
        pair_labels=torch.randint(2, (size,), generator=generator),
    )


def make_batches(config: ModelConfig, args) -> list[PretrainingBatch]:
    if args.full:
        return [full_batch(config, args.full, args.micro_batch, seed) for seed in range(NUM_BATCHES)]
    starts = np.arange(NUM_BATCHES) * args.micro_batch
    return [make_batch(Shards(args.data).gather(np.arange(start, start + args.micro_batch))) for start in starts]


def deepspeed_config(args) -> dict:
    return {
        "train_batch_size": args.micro_batch,
        "train_micro_batch_size_per_gpu": args.micro_batch,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": args.bf16},
        "zero_optimization": {"stage": args.zero},
        "optimizer": {"type": args.optimizer, "params": {"lr": 1e-4}},
        "scheduler": {"type": "WarmupPolynomialLR", "params": {"total_num_steps": 10**6}},
    }


def our_step(engine, batch: PretrainingBatch) -> None:
    mlm_loss, _, pair_loss, _ = engine(batch, (0, engine.global_steps, 0, 0))
    engine.backward(mlm_loss.mean() + pair_loss.mean())
    engine.step()


def their_step(engine, rectangle: dict[str, torch.Tensor]) -> None:
    engine.backward(engine(**rectangle).loss)
    engine.step()


def competitors(config: ModelConfig, batches: list[PretrainingBatch], layout: Layout, args) -> dict[str, Callable]:
    """{name: a function that trains on batch i}."""
    module = BertForPreTraining(config, layout, args.recompute)
    init_weights(module, seed=0)
    engine, _ = initialize_engine(module, deepspeed_config(args), layout)
    on_device = [batch.to(layout.device) for batch in batches]
    found = {"ours": lambda i: our_step(engine, on_device[i])}
    length = args.full or Shards(args.data).manifest["config"]["seq_length"]
    rectangles = [{k: v.to(layout.device) for k, v in padded(batch, length).items()} for batch in batches]
    for name in ("transformers, SDPA", "transformers, compiled")[: 0 if args.alone else 1 + args.compile]:
        theirs = HuggingFaceBert(BertConfig(**config.to_json(), attn_implementation="sdpa")).to(layout.device)
        if name.endswith("compiled"):
            theirs = torch.compile(theirs)
        their_engine, _ = initialize_engine(theirs, deepspeed_config(args), layout)
        found[name] = partial(lambda engine, i: their_step(engine, rectangles[i]), their_engine)
    return found


def timed(step: Callable, num_steps: int, device: torch.device) -> tuple[float, float | None]:
    """(seconds of a step, peak GiB that the step adds to and holds on a GPU) over `num_steps`."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for index in range(num_steps):
        step(index % NUM_BATCHES)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / num_steps
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None


def measure(config: ModelConfig, args, layout: Layout) -> list[dict]:
    batches = make_batches(config, args)
    lengths = [torch.diff(batch.sequences.cu_seqlens).tolist() for batch in batches]
    flops = np.mean(
        [config.training_flops(part, len(batch.masked_lm_labels)) for part, batch in zip(lengths, batches, strict=True)]
    )
    num_tokens, peak = np.mean([sum(part) for part in lengths]), peak_flops(layout.device)
    steps = competitors(config, batches, layout, args)
    results: dict[str, list[tuple]] = {name: [] for name in steps}
    for turn in range(args.repeats + 1):  # the first warms up
        for name, step in steps.items():
            result = timed(step, args.steps, layout.device)
            if turn:
                results[name].append(result)
    medians = {name: float(np.median([seconds for seconds, _ in found])) for name, found in results.items()}
    rows = []
    for name, seconds in medians.items():
        row = {"what": name, "ms": 1e3 * seconds, "time / ours": seconds / medians["ours"]}
        row |= {"sequences/s": args.micro_batch / seconds, "real tokens/s": num_tokens / seconds}
        memory = results[name][0][1]
        rows.append(row | {"MFU": flops / seconds / peak} | ({"peak GiB": memory} if memory else {}))
    rows.append({"what": "floor: these products at peak speed", "ms": 1e3 * flops / peak, "MFU": 1.0})
    return rows


def kernels(config: ModelConfig, args, layout: Layout) -> list[dict]:
    """The kernels that take longest in our step, with their share of all."""
    batches = make_batches(config, args)
    args.alone = True
    step = competitors(config, batches, layout, args)["ours"]
    step(0)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu := layout.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        timed(step, NUM_BATCHES, layout.device)
    found = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
             for event in profile.key_averages()}  # fmt: skip
    total = sum(found.values())
    longest = sorted(found, key=found.get, reverse=True)[:NUM_KERNELS]
    return [
        {"kernel": name[:100], "ms a step": found[name] / 1e3 / NUM_BATCHES, "share, %": 100 * found[name] / total}
        for name in longest
    ]


def largest_micro_batch(config: ModelConfig, args, layout: Layout) -> list[dict]:
    """Our sequences/s at ever larger micro-batches until the GPU's memory is full."""
    args.alone, rows = True, []
    while True:
        try:
            row = measure(config, args, layout)[0]
        except torch.cuda.OutOfMemoryError:
            return rows
        rows.append({"micro-batch": args.micro_batch, **row})
        args.micro_batch *= 2
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    data = options.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", type=Path, help="folder of masked shards made by data_prep.build")
    data.add_argument("--full", type=int, metavar="LENGTH", help="random sequences of exactly this length instead")
    options.add_argument("--model", default="base", choices=PRESETS, help="default: base")
    options.add_argument("--layers", type=int, help="fewer layers than the model has, where memory is short")
    options.add_argument("--micro-batch", type=int, default=8, help="sequences a step (default 8)")
    options.add_argument("--steps", type=int, default=2, help="steps a turn (default 2)")
    options.add_argument("--zero", type=int, default=1, choices=range(4), help="stage (default 1)")
    options.add_argument("--optimizer", default="Lamb", choices=("Lamb", "AdamW"), help="default Lamb")
    options.add_argument("--recompute", default="none", choices=("none", "selective", "full"), help="of ours")
    options.add_argument("--bf16", action="store_true")
    options.add_argument("--compile", action="store_true", help="beside torch.compile of transformers' model, too")
    options.add_argument("--alone", action="store_true", help="ours only")
    options.add_argument("--profile", action="store_true", help="the kernels that take longest in our step")
    options.add_argument("--largest", action="store_true", help="on a GPU: how far the micro-batch can be doubled")
    args = options.parse_args(argv)
    layout = init_layout()
    if args.largest and layout.device.type != "cuda":
        raise ValueError("--largest fills a GPU's memory, and there is no GPU here")
    vocab_size = 30_522 if args.full else Shards(args.data).manifest["vocab"]["size"]
    values = vars(load_model_config(args.model, vocab_size))
    config = ModelConfig(**{**values, "num_hidden_layers": args.layers or values["num_hidden_layers"]})
    text = f"full sequences of {args.full}" if args.full else f"real text in {args.data.name}"
    title = (
        f"{args.model}, {config.num_hidden_layers} layers, {text}, micro-batch {args.micro_batch}, {args.optimizer},"
    )
    title += f" ZeRO {args.zero}, {'bf16' if args.bf16 else 'fp32'}"
    tables = {title: measure(config, args, layout)}
    if args.profile:
        tables[f"Longest kernels, {title}"] = kernels(config, args, layout)
    if args.largest:
        tables[f"Larger and larger, {title}"] = largest_micro_batch(config, args, layout)
    topic = f"step-{args.model}-{f'full-{args.full}' if args.full else args.data.name}"
    report(topic, tables, args.save)


if __name__ == "__main__":
    run_cli(main)
