"""The work of a training step in counts that are the same on every machine: floating-point operations, operators, new
bytes, values that Python waits for, collectives and their bytes, and Python calls.

    python -m benchmarks.work                                                                   one rank, and two:
    python -m torch.distributed.run --standalone --nproc-per-node 2 --module benchmarks.work

The bytes that a step's collectives carry are compared with those that `pretrain.plan` predicts.

A time says little on a busy machine and nothing about another one, but a change that adds work shows in these counts
(tests/benchmarks/test_work.py checks them). The model is small and the tokens are random. The counts grow with model
and batch, but their ratio to what is needed does not.

What a GPU would do is counted on the meta device, whose tensors have shapes and no values: the code takes a GPU's
paths, but runs no kernel and needs no GPU.
"""

import dataclasses
import importlib
import math
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import parser, report
from data_prep.cli import run_cli
from pretrain.costs import DEVICES, PlannedRun, communication
from pretrain.data import pack_sequences
from pretrain.engine import initialize_engine
from pretrain.layout import Layout, init_layout
from pretrain.model import BertForPreTraining, PretrainingBatch, init_weights
from pretrain.model_config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=1024, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512
)
LENGTHS = (64, 40, 64, 24)  # of a micro-batch's sequences
NUM_PREDICTIONS = 9  # of a sequence of 64 tokens; proportionally fewer of a shorter one
NUM_MICRO_BATCHES = 2
SMALL = 1024  # bytes


class Case(NamedTuple):
    """A layout whose training step is counted."""

    num_ranks: int
    stage: int  # of ZeRO
    tensor_parallel: int = 1
    sequence_parallel: bool = False
    optimizer: str = "Lamb"


CASES = (
    Case(1, 0),
    Case(1, 0, optimizer="AdamW"),
    Case(2, 1),
    Case(2, 2),
    Case(2, 3),
    Case(2, 0, tensor_parallel=2),
    Case(2, 1, tensor_parallel=2, sequence_parallel=True),
    Case(4, 2, tensor_parallel=2),
)


LARGE = ModelConfig(
    vocab_size=1024, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)
LARGE_BATCH, LARGE_LENGTH = 256, 128  # on the meta device sizes cost nothing
NO_BYTES = {"empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "_unsafe_view"}
PRODUCTS = {"mm", "addmm", "bmm"} | {
    f"_{kernel}_attention_{way}" for kernel in ("flash", "efficient") for way in ("forward", "backward")
}
# The files with which torch computes the shapes of meta tensors.
META_OPERATORS = tuple(
    f"{Path(torch.__file__).parent}/{name}"
    for name in ("_meta_registrations", "_decomp", "_refs", "_prims", "_library", "distributed/_tools")
)


class Counting(TorchDispatchMode):
    """Counts what reaches torch's dispatcher: operators, bytes of new storages, collectives by their group, and the
    bytes that this rank sends in them on a ring (as in `pretrain.costs.communication`). Of collectives of at most SMALL
    bytes, such as norms, only the calls are counted.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.counts = Counter({"operators": 0, "values read by Python": 0})
        groups = (layout.get_model_parallel_group(), layout.get_data_parallel_group())
        self.axes = dict(zip((group.group_name for group in groups), ("tensor parallel", "data parallel"), strict=True))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "c10d":
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            axis = self.axes.get(group.group_name, "all ranks")
            largest = max(map(_bytes, _tensors(args)))
            if largest <= SMALL:
                self.counts[f"{axis}, small, calls"] += 1
            else:
                passes = 2 if function._opname == "allreduce_" else 1  # one to reduce, one to distribute
                self.counts[f"{axis}, calls"] += 1
                self.counts[f"{axis}, bytes"] += passes * largest * (group.size() - 1) // group.size()
            return result
        self.counts["operators"] += 1
        if function is torch.ops.aten._local_scalar_dense.default:
            self.counts["values read by Python"] += 1
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        new = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors(result)}
        self.counts["new bytes"] += sum(size for key, size in new.items() if key not in given)
        return result


class CountingPasses(TorchDispatchMode):
    """Counts passes over an activation [T, H] in a GPU's memory, outside matrix products and attention: the bytes that
    each operator reads and writes, divided by those of the activation. Smaller tensors, such as weights, are left out.
    """

    def __init__(self, activation: torch.Tensor) -> None:
        super().__init__()
        self.unit, self.smallest = _bytes(activation), activation.numel() // 2
        self.passes: Counter[str] = Counter()
        self.num_operators = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.num_operators += 1
        is_view = any(found.alias_info and not found.alias_info.is_write for found in function._schema.returns)
        if not (is_view or function._opname in NO_BYTES | PRODUCTS or function.namespace == "c10d"):
            moved = [tensor for tensor in _tensors((args, kwargs, result)) if tensor.numel() >= self.smallest]
            self.passes[function._opname] += sum(map(_bytes, moved)) / self.unit
        return result


class LayerCounts(NamedTuple):
    """The work of forward and backward of one layer on a GPU."""

    passes: float  # over an activation [T, H/tp], outside products and attention
    operators: int
    python_calls: int  # outside operators


class FusedDropout(TorchFunctionMode):
    """Gives the meta device a GPU's dropout: one kernel, with a mask of one byte per value."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.dropout:
            return torch.native_dropout(args[0], kwargs["p"], True)[0]
        return function(*args, **(kwargs or {}))


def _tensors(values) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def count_python_calls(run) -> int:
    """Calls of Python functions in `run()` on this thread. The calls with which torch computes an operator for the meta
    device are left out, because a GPU would run a kernel instead.
    """
    calls = depth = 0  # depth: of calls inside such an operator

    def count(frame, event, argument) -> None:
        nonlocal calls, depth
        if event == "call" and (depth or frame.f_code.co_filename.startswith(META_OPERATORS)):
            depth += 1
        elif event == "call":
            calls += 1
        elif event == "return" and depth:
            depth -= 1

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def random_batch(config: ModelConfig) -> PretrainingBatch:
    """A micro-batch of LENGTHS, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(LENGTHS)
    token_ids = torch.randint(config.vocab_size, (int(lengths.sum()),), generator=generator)
    starts = torch.cumsum(lengths, 0) - lengths
    rows = torch.cat([start + torch.arange(_predictions(n)) for start, n in zip(starts, LENGTHS, strict=True)])
    return PretrainingBatch(
        sequences=pack_sequences(token_ids.numpy(), lengths.numpy(), (lengths // 2).numpy()),
        masked_lm_rows=rows,
        masked_lm_labels=torch.randint(config.vocab_size, rows.shape, generator=generator),
        pair_labels=torch.zeros(len(LENGTHS), dtype=torch.int64),
    )


def num_predictions() -> int:
    """Predictions of one micro-batch."""
    return sum(map(_predictions, LENGTHS))


def _predictions(length: int) -> int:
    return math.ceil(NUM_PREDICTIONS * length / 64)


def needed_flops(config: ModelConfig) -> int:
    """FLOPs of the matrix products of one replica's step, by the formula of MFU."""
    return NUM_MICRO_BATCHES * config.training_flops(list(LENGTHS), num_predictions())


def deepspeed_config(stage: int, dp_size: int, optimizer: str) -> dict:
    """Every collective occurs once: the buckets hold all gradients, and no parameter is too small to be sharded."""
    zero = {"stage": stage, "reduce_bucket_size": 2_000_000, "stage3_param_persistence_threshold": 0}
    return {
        "train_batch_size": NUM_MICRO_BATCHES * len(LENGTHS) * dp_size,
        "train_micro_batch_size_per_gpu": len(LENGTHS),
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "optimizer": {"type": optimizer, "params": {"lr": 1e-3}},
        "scheduler": {"type": "WarmupPolynomialLR", "params": {"total_num_steps": 10}},
    }


def count_step(case: Case) -> dict[str, int]:
    """Counts of this rank's second step, and Python calls of its third, after all is built and compiled. Collective."""
    layout = init_layout(case.tensor_parallel, case.sequence_parallel)
    deepspeed = deepspeed_config(case.stage, layout.dp_size, case.optimizer)
    module = BertForPreTraining(CONFIG, layout)
    init_weights(module, seed=0)
    engine, _ = initialize_engine(module, deepspeed, layout)
    batch = random_batch(CONFIG).to(layout.device)

    def step() -> None:
        for index in range(NUM_MICRO_BATCHES):
            output = engine(batch, (0, 0, index, layout.dp_rank))
            engine.backward(output.mlm_loss.mean() + output.pair_loss.mean())
            engine.step()

    for _ in range(2):  # the first step builds and allocates what is kept
        with FlopCounterMode(display=False) as flops, Counting(layout) as counting:
            step()
    counts = {"matrix-product FLOPs": flops.get_total_flops(), **dict(sorted(counting.counts.items()))}
    return counts | {"Python calls": count_python_calls(step)}


def meta_step(layout: Layout, config: ModelConfig, dtype: torch.dtype, lengths, recompute: str = "none"):
    """A function that runs forward and backward of one micro-batch on the meta device, as a GPU would."""
    importlib.import_module("torch.distributed._tools.fake_collectives")  # lets collectives take meta tensors
    model = BertForPreTraining(config, layout, recompute).to("meta", dtype)
    lengths = np.array(lengths)
    sequences = pack_sequences(np.zeros(lengths.sum(), np.int64), lengths, lengths // 2)
    rows, labels = torch.zeros(len(lengths), dtype=torch.int64), torch.zeros(len(lengths), dtype=torch.int64)
    batch = PretrainingBatch(sequences, rows, labels, labels).to(torch.device("meta"))

    def step() -> None:
        output = model(batch, (0,))
        (output.mlm_loss.sum() + output.pair_loss.sum()).backward()

    return step


def count_on_meta(tensor_parallel: int, sequence_parallel: bool, dtype: torch.dtype) -> LayerCounts:
    """This rank's counts for one layer of LARGE on a GPU: those of two layers minus those of one. Collective."""
    layout = init_layout(tensor_parallel, sequence_parallel)
    size = (LARGE_BATCH * LARGE_LENGTH, LARGE.hidden_size // layout.tp_size)  # [T, H/tp]
    activation = torch.empty(size, dtype=dtype, device="meta")
    found = []
    for num_layers in (1, 2):
        config = dataclasses.replace(LARGE, num_hidden_layers=num_layers)
        step = meta_step(layout, config, dtype, [LARGE_LENGTH] * LARGE_BATCH)
        with FusedDropout(), CountingPasses(activation) as counting:
            step()
        num_calls = count_python_calls(step)
        found.append((counting.passes.total(), counting.num_operators, num_calls))
    return LayerCounts(*(two - one for one, two in zip(*found, strict=True)))


def planned_bytes(case: Case) -> dict[str, float]:
    """Planned bytes that a rank sends per step along each axis. Collectives of at most SMALL bytes are left out: those
    with one number per prediction, and LAMB's norms.
    """
    run = PlannedRun(
        model=CONFIG,
        deepspeed=deepspeed_config(case.stage, case.num_ranks // case.tensor_parallel, case.optimizer),
        num_nodes=1,
        gpus_per_node=case.num_ranks,
        tp_size=case.tensor_parallel,
        seq_length=max(LENGTHS),
        mean_length=sum(LENGTHS) / len(LENGTHS),
        max_predictions=num_predictions() / len(LENGTHS),
        device=DEVICES["cpu"],
        sequence_parallel=case.sequence_parallel,
        on_gpu=False,
    )
    planned = communication(run)
    assert planned["LAMB's norms"] <= 4 * SMALL
    losses = NUM_MICRO_BATCHES * (run.tp_size - 1) / run.tp_size * 2 * num_predictions() * 20
    apart = {"tensor parallel": losses, "data parallel": 0}
    return {axis: sum(planned[name] for name in planned if name.startswith(axis)) - apart[axis] for axis in apart}


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__).parse_args(argv)
    num_ranks = init_layout().dp_size
    cases = [case for case in CASES if case.num_ranks == num_ranks]
    if not cases:
        choices = sorted({case.num_ranks for case in CASES})
        raise ValueError(f"no layout of {num_ranks} ranks is counted; choose from {choices}")
    counts, sent = {}, []
    for case in cases:
        name = f"{case.optimizer}, ZeRO {case.stage}"
        if case.tensor_parallel > 1:
            name += f", tensor parallel {case.tensor_parallel}"
        if case.sequence_parallel:
            name += ", sequences"
        counts[name] = count_step(case)
        for axis, planned in planned_bytes(case).items():
            if planned:
                counted = counts[name][f"{axis}, bytes"]
                row = {"layout": name, "axis": axis, "counted": counted, "planned": round(planned)}
                sent.append(row | {"counted - planned": counted - round(planned)})
    names = dict.fromkeys(what for found in counts.values() for what in found)
    rows = [{"what": what, **{name: found.get(what, 0) for name, found in counts.items()}} for what in names]
    layouts = [(1, False)] if num_ranks == 1 else [(2, False), (2, True)] if num_ranks == 2 else []
    layers = [
        {"tensor parallel": size, "sequences": is_split, **count_on_meta(size, is_split, torch.bfloat16)._asdict()}
        for size, is_split in layouts
    ]
    tables = {f"One step, {num_ranks} {'ranks' if num_ranks > 1 else 'rank'}, counted": rows}
    if sent:
        tables["Bytes that a rank sends in a step; ZeRO 1 to 3 pad their partitions"] = sent
    if layers:
        tables["One layer of large in bf16 on a GPU, forward and backward, counted on the meta device"] = layers
    if dist.get_rank() == 0:
        report(f"work-{num_ranks}-ranks", tables, args.save)


if __name__ == "__main__":
    run_cli(main)
