"""The cost of a run before it starts: parameters, memory, communication and time, and which layouts fit.

Needs neither a GPU nor ranks. The arithmetic and its sources are in costs.py.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from data_prep.cli import at_least, number, option, parse, run_cli
from pretrain.costs import (
    DEVICES,
    LINK_EFFICIENCY,
    PlannedRun,
    activation_bytes,
    communication,
    fits,
    held_parameters,
    layouts,
    memory,
    step_seconds,
    training_flops,
)
from pretrain.deepspeed_config import load_deepspeed_config, num_accumulation_steps
from pretrain.model_config import PRESETS, RECOMPUTE, load_model_config
from pretrain.parameter_table import num_parameters

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class PhaseOptions:
    """The options of a phase that pretrain.plan and pretrain.train share."""

    model: str = option(f"{', '.join(PRESETS)}, or a Hugging Face config.json", metavar="NAME")
    deepspeed_config: Path = option(
        "DeepSpeed JSON of this phase, see ds_configs/README.md", flags=("--deepspeed-config", "--deepspeed_config")
    )
    overrides: tuple[str, ...] = option(
        "overrides of that file, applied in order: optimizer.params.lr=0.004",
        default=(),
        flags=("--set",),
        metavar="KEY=VALUE",
    )
    tensor_parallel: int = option("ranks that share one copy of the model", default=1, type=at_least(1))
    sequence_parallel: bool = option(
        "also split the activations between tensor-parallel products over those ranks, to save memory", default=False
    )
    recompute: str = option(
        "what the backward pass computes again, to save memory: attention (selective) or whole layers (full)",
        default="none",
        choices=RECOMPUTE,
    )


@dataclass(frozen=True, kw_only=True)
class PlanOptions(PhaseOptions):
    r"""Predict parameters, memory, communication and time of a run, and the layouts that fit. Starts nothing.

        python -m pretrain.plan --model large --deepspeed-config ds_configs/large_lamb_phase1.json --nodes 8 \
            --gpus-per-node 8 --tensor-parallel 2 --device a100-80g --seq-length 128
    """

    nodes: int = option("number of hosts", default=1, type=at_least(1))
    gpus_per_node: int = option("devices of a host", default=8, type=at_least(1))
    device: str = option("kind of device; a cpu is one core", default="a100-80g", choices=DEVICES)
    efficiency: float | None = option(
        "share of the device's peak FLOP/s that the run reaches; if not given, the measured one in costs.py",
        default=None,
        type=number(above=0, low=0, high=1),
    )
    seq_length: int = option("longest sequence, in tokens", default=128, type=at_least(1))
    mean_length: float | None = option("real tokens per sequence; if not given, the longest", default=None)
    max_predictions: int | None = option(
        "masked tokens per sequence; if not given, 15 %% of --seq-length", default=None
    )
    vocab_size: int = option("for a preset; the default is bert-base-uncased's", default=30522, type=at_least(1))


def plan_run(options: PlanOptions) -> PlannedRun:
    """The run that the options describe. Raises ValueError if it is impossible."""
    model = load_model_config(options.model, options.vocab_size if options.model in PRESETS else None)
    model.check_tensor_parallel(options.tensor_parallel)
    if options.gpus_per_node % options.tensor_parallel:
        raise ValueError(
            f"--tensor-parallel {options.tensor_parallel} does not divide --gpus-per-node {options.gpus_per_node}: a"
            " tensor-parallel group must stay within one node, because its speed depends on the links between its ranks"
        )
    if options.sequence_parallel and options.tensor_parallel == 1:
        raise ValueError("--sequence-parallel needs --tensor-parallel of at least 2: it splits over the same ranks")
    longest = options.seq_length
    if longest > model.max_position_embeddings:
        raise ValueError(f"--seq-length {longest} exceeds max_position_embeddings={model.max_position_embeddings}")
    mean_length = float(longest) if options.mean_length is None else options.mean_length
    predictions = math.ceil(0.15 * longest) if options.max_predictions is None else options.max_predictions
    for flag, value in (("--mean-length", mean_length), ("--max-predictions", predictions)):
        if not 1 <= value <= longest:
            raise ValueError(f"{flag} {value:g} is not between 1 and --seq-length {longest}")
    device = DEVICES[options.device]
    if options.efficiency is not None:
        device = dataclasses.replace(device, efficiency=options.efficiency)
    deepspeed = load_deepspeed_config(options.deepspeed_config, options.overrides)
    num_devices = options.nodes * options.gpus_per_node
    num_accumulation_steps(deepspeed, num_devices // options.tensor_parallel)
    return PlannedRun(
        model=model,
        deepspeed=deepspeed,
        num_nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        tp_size=options.tensor_parallel,
        seq_length=longest,
        mean_length=mean_length,
        max_predictions=predictions,
        device=device,
        sequence_parallel=options.sequence_parallel,
        recompute=options.recompute,
        on_gpu=options.device != "cpu",
    )


def report(run: PlannedRun, name: str) -> str:
    """The full report as text: model, memory, communication, time, layouts."""
    sent = [(part, _gib(size)) for part, size in communication(run).items()]
    traffic = _table(sent, ("sent per device and step", "GiB"))
    return "\n\n".join([_overview(run, name), _memory_table(run), traffic, _layout_table(run)])


def _overview(run: PlannedRun, name: str) -> str:
    seconds, num_devices = step_seconds(run), run.dp_size * run.tp_size
    batch, rate = run.deepspeed["train_batch_size"], run.deepspeed["train_batch_size"] / seconds["step"]
    rows = [
        ("parameters", f"{num_parameters(run.model):,}"),
        ("parameters of one rank", f"{held_parameters(run):,}"),
        ("layout", f"data parallel {run.dp_size} x tensor parallel {run.tp_size}, ZeRO {run.stage}"),
        ("batch", f"{batch:,} = {run.micro_batch} x {run.num_micro_batches} micro-batches x {run.dp_size}"),
        ("FLOPs per step", f"{training_flops(run):.3g}"),
        *((f"step: {part}", f"{1e3 * value:,.1f} ms") for part, value in seconds.items()),
        ("sequences/s", f"{rate:,.0f} ({rate / num_devices:,.0f} per device)"),
        (f"time to train, {run.num_steps:,} steps", f"{run.num_steps * seconds['step'] / 3600:,.2f} h"),
    ]
    assumed = (
        f"Assumed: {run.device.efficiency:.0%} of the device's peak (--efficiency), {LINK_EFFICIENCY:.0%} of its links,"
        " no overlap."
    )
    return f"{name} on {num_devices} devices\n{_table(rows)}\n{assumed}"


def _memory_table(run: PlannedRun) -> str:
    parts = memory(run)
    peak = parts.pop("peak")
    for kind in RECOMPUTE:
        if kind != run.recompute:
            parts[f"activations, recompute {kind}"] = activation_bytes(run, kind)
    parts[f"peak, of {run.device.memory / GIB:.1f}: {'fits' if fits(run) else 'does not fit'}"] = peak
    return _table([(part, _gib(size)) for part, size in parts.items()], ("memory of one device", "GiB"))


def _layout_table(run: PlannedRun) -> str:
    """All layouts of these devices; a star marks the requested one."""
    headers = ("tensor parallel", "data parallel", "ZeRO", "recompute", "peak GiB", "fits", "step ms", "hours")
    rows = []
    for other in layouts(run):
        seconds, answer = step_seconds(other)["step"], "yes" if fits(other) else "no"
        asked = (other.tp_size, other.stage, other.recompute) == (run.tp_size, run.stage, run.recompute)
        hours = f"{other.num_steps * seconds / 3600:,.2f}{' *' if asked else ''}"
        layout = (other.tp_size, other.dp_size, other.stage, other.recompute)
        rows.append((*layout, _gib(memory(other)["peak"]), answer, f"{1e3 * seconds:,.0f}", hours))
    return _table(rows, headers)


def _table(rows: list[tuple], headers: tuple[str, ...] = ()) -> str:
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)


def _gib(size: float) -> str:
    return f"{size / GIB:,.3f}"


def main(argv: list[str] | None = None) -> None:
    options = parse(PlanOptions, "pretrain.plan", argv)
    print(report(plan_run(options), options.model))


if __name__ == "__main__":
    run_cli(main)
