r"""What will this run cost? Parameters, memory, communication and time, and which layouts fit, before anything starts.

    python -m pretrain.plan --model large --deepspeed_config ds_configs/large_lamb_phase1.json --nodes 8 \
        --gpus-per-node 8 --tensor-parallel 2 --device a100-80g --seq-length 128

Needs no GPU and no ranks; the arithmetic and its sources are in costs.py.
"""

import argparse
import dataclasses
import math
from pathlib import Path

from tabulate import tabulate

from data_prep.cli import run_cli
from pretrain.costs import (
    DEVICES,
    LINK_EFFICIENCY,
    Job,
    activation_bytes,
    communication,
    fits,
    held_parameters,
    layouts,
    memory,
    step_seconds,
    training_flops,
)
from pretrain.deepspeed_config import load_deepspeed_config
from pretrain.model_config import PRESETS, RECOMPUTE, load_model_config
from pretrain.parameter_table import num_parameters

GIB = 2**30


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pretrain.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help=f"{', '.join(PRESETS)}, or a Hugging Face config.json")
    parser.add_argument("--deepspeed_config", required=True, type=Path, help="DeepSpeed JSON of the phase")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides of the DeepSpeed config"
    )
    parser.add_argument("--nodes", type=int, default=1, help="hosts (default 1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="devices of a host (default 8)")
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, help="ranks that share a copy of the model (default 1)"
    )
    parser.add_argument("--sequence-parallel", action="store_true", help="as in pretrain.train")
    parser.add_argument(
        "--recompute", choices=("none", "selective", "full"), default="none", help="as in pretrain.train"
    )
    parser.add_argument("--device", choices=DEVICES, default="a100-80g", help="a cpu is one core (default a100-80g)")
    parser.add_argument("--efficiency", type=float, help="share of the device's peak; default: measured, see costs.py")
    parser.add_argument("--seq-length", type=int, default=128, help="longest sequence (default 128)")
    parser.add_argument("--mean-length", type=float, help="real tokens of a sequence; default: the longest")
    parser.add_argument("--max-predictions", type=int, help="of a sequence; default: 15 %% of --seq-length")
    parser.add_argument("--vocab-size", type=int, default=30522, help="for a preset (default 30522, bert-base-uncased)")
    return parser.parse_args(argv)


def make_job(args: argparse.Namespace) -> Job:
    """The command line, checked; ValueError names what cannot be."""
    for name in ("nodes", "gpus_per_node", "tensor_parallel", "seq_length"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} is not a positive number")
    model = load_model_config(args.model, args.vocab_size if args.model in PRESETS else None)
    model.check_tensor_parallel(args.tensor_parallel)
    if args.gpus_per_node % args.tensor_parallel:
        raise ValueError(
            f"--tensor-parallel {args.tensor_parallel} does not divide --gpus-per-node {args.gpus_per_node}: a"
            " tensor-parallel group has to stay in one node, its links are what it waits for"
        )
    if args.sequence_parallel and args.tensor_parallel == 1:
        raise ValueError("--sequence-parallel needs --tensor-parallel of at least 2: it splits over the same ranks")
    if args.seq_length > model.max_position_embeddings:
        raise ValueError(
            f"--seq-length {args.seq_length} exceeds max_position_embeddings={model.max_position_embeddings}"
        )
    mean_length = float(args.seq_length) if args.mean_length is None else args.mean_length
    if not 1 <= mean_length <= args.seq_length:
        raise ValueError(f"--mean-length {mean_length:g} is not between 1 and --seq-length {args.seq_length}")
    device = DEVICES[args.device]
    if args.efficiency is not None:
        if not 0 < args.efficiency <= 1:
            raise ValueError(f"--efficiency {args.efficiency} is not a share of the peak in (0, 1]")
        device = dataclasses.replace(device, efficiency=args.efficiency)
    predictions = math.ceil(0.15 * args.seq_length) if args.max_predictions is None else args.max_predictions
    if not 1 <= predictions <= args.seq_length:
        raise ValueError(f"--max-predictions {predictions} is not between 1 and --seq-length {args.seq_length}")
    deepspeed = load_deepspeed_config(args.deepspeed_config, args.set)
    job = Job(
        *(model, deepspeed, args.nodes, args.gpus_per_node, args.tensor_parallel),
        *(args.seq_length, mean_length, predictions, device, args.sequence_parallel, args.recompute),
        on_gpu=args.device != "cpu",
    )
    _ = job.num_micro_batches  # raises if the batch does not divide
    return job


def report(job: Job, name: str) -> str:
    """The whole answer as text: model, memory, communication, time, layouts."""
    return "\n\n".join([_overview(job, name), _memory_table(job), _traffic_table(job), _layout_table(job)])


def _overview(job: Job, name: str) -> str:
    flops, seconds = training_flops(job), step_seconds(job)
    batch, num_devices = job.deepspeed["train_batch_size"], job.dp_size * job.tp_size
    hours = job.num_steps * seconds["step"] / 3600
    rows = [
        ("parameters", f"{num_parameters(job.model):,}"),
        ("parameters of one rank", f"{held_parameters(job):,}"),
        ("layout", f"data parallel {job.dp_size} x tensor parallel {job.tp_size}, ZeRO {job.stage}"),
        ("batch", f"{batch:,} = {job.micro_batch} x {job.num_micro_batches} micro-batches x {job.dp_size}"),
        ("FLOPs a step", f"{flops:.3g}"),
        *((f"step: {part}", f"{1e3 * value:,.1f} ms") for part, value in seconds.items()),
        ("sequences/s", f"{batch / seconds['step']:,.0f} ({batch / seconds['step'] / num_devices:,.0f} a device)"),
        (f"time to train, {job.num_steps:,} steps", f"{hours:,.2f} h"),
    ]
    assumed = (
        f"Assumed: {job.device.efficiency:.0%} of the device's peak (--efficiency), {LINK_EFFICIENCY:.0%} of its links,"
        " nothing overlapped."
    )
    return f"{name} on {num_devices} devices\n{tabulate(rows, tablefmt='simple', disable_numparse=True)}\n{assumed}"


def _memory_table(job: Job) -> str:
    parts = memory(job)
    peak = parts.pop("peak")
    rows = [(part, _gib(size)) for part, size in parts.items()]
    rows += [
        (f"activations, recompute {kind}", _gib(activation_bytes(job, kind)))
        for kind in RECOMPUTE
        if kind != job.recompute
    ]
    verdict = "fits" if fits(job) else "does not fit"
    rows.append((f"peak, of {job.device.memory / GIB:.1f}: {verdict}", _gib(peak)))
    return tabulate(rows, headers=("memory of one device", "GiB"), tablefmt="simple", disable_numparse=True)


def _traffic_table(job: Job) -> str:
    rows = [(part, _gib(size)) for part, size in communication(job).items()]
    return tabulate(rows, headers=("sent by one device in a step", "GiB"), tablefmt="simple", disable_numparse=True)


def _layout_table(job: Job) -> str:
    """Every layout of these devices, the asked one marked."""
    rows = []
    for other in layouts(job):
        asked = (other.tp_size, other.stage, other.recompute) == (job.tp_size, job.stage, job.recompute)
        seconds = step_seconds(other)["step"]
        rows.append(
            (
                *(other.tp_size, other.dp_size, other.stage, other.recompute, _gib(memory(other)["peak"])),
                *("yes" if fits(other) else "no", f"{1e3 * seconds:,.0f}"),
                f"{other.num_steps * seconds / 3600:,.2f}" + " *" * asked,
            )
        )
    headers = ("tensor parallel", "data parallel", "ZeRO", "recompute", "peak GiB", "fits", "step ms", "hours")
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)


def _gib(size: float) -> str:
    return f"{size / GIB:,.3f}"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    print(report(make_job(args), args.model))


if __name__ == "__main__":
    run_cli(main)
