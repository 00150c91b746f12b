"""Layers that are split over tensor-parallel ranks, and dropout that needs no generator state.

Shapes follow the legend in model.py. Activations are flat, [T, H]: the T real tokens of a micro-batch without padding.

Megatron-core supplies the vocabulary-parallel embedding and cross entropy and the tensor-parallel collectives. Its
sequence parallelism needs CUDA; the one in this module runs on every device.

Dropout masks are functions of a seed. Those of hidden states are the same at every tensor-parallel size. Those of
attention heads, of data-parallel ranks and under sequence parallelism depend on the layout, because each rank draws
masks for what it holds. To be independent of it, attention masks would have to be drawn per sample and head and passed
to attention. That would cost B * N * S * S bytes per layer and rule out the fused kernels, which draw their own.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.layout import Layout  # before megatron-core, whose import warnings it silences

# isort: split
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)

# torch 2.13 renamed these collectives and warns about the old names.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Sequences:
    """A micro-batch of B sequences without padding, as the encoder reads it."""

    token_ids: Tensor  # [T] int64
    segment_ids: Tensor  # [T] int64, 0 or 1
    position_ids: Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: Tensor  # [B+1] int32, where each sequence starts in T; the last entry is T
    max_seqlen: int  # S, the length of the longest

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def padded_index(self) -> Tensor | None:
        """[T] Each token's row in the padded [B * S]; None if every sequence has length S."""
        if len(self.token_ids) == self.num_sequences * self.max_seqlen:
            return None
        starts = self.cu_seqlens[:-1].long()
        sequence = torch.repeat_interleave(torch.diff(self.cu_seqlens).long(), output_size=len(self.token_ids))
        return torch.arange(len(self.token_ids), device=starts.device) - starts[sequence] + sequence * self.max_seqlen

    def to(self, device: torch.device) -> "Sequences":
        return Sequences(
            self.token_ids.to(device, non_blocking=True),
            self.segment_ids.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.cu_seqlens.to(device, non_blocking=True),
            self.max_seqlen,
        )


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on `parts` alone."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def sub_seed(seed: tuple | None, *place: int | str) -> tuple | None:
    """The dropout seed of a `place`, such as a layer, within the scope of `seed`; None (no dropout) stays None."""
    return None if seed is None else (*seed, *place)


def seed_dropout(seed: tuple, device: torch.device) -> None:
    """Make the next dropout mask on `device` a function of `seed`.

    `torch.manual_seed` would seed all backends, which took most of the host's time per step on a GPU.
    """
    on_gpu = device.type == "cuda" and torch.cuda.is_initialized()
    generator = torch.cuda.default_generators[device.index] if on_gpu else torch.default_generator
    generator.manual_seed(derive_seed(*seed))


def dropout(x: Tensor, probability: float, seed: tuple | None) -> Tensor:
    """Dropout whose mask is a function of `seed`; x itself when the seed is None (evaluation)."""
    if seed is None or probability == 0:
        return x
    seed_dropout(seed, x.device)
    return F.dropout(x, probability)


def mark_split(parameter: nn.Parameter, dim: int) -> None:
    """Mark a parameter as a slice along `dim` by Megatron's attributes; DeepSpeed's gradient norm reads the first."""
    parameter.tensor_model_parallel = True
    parameter.partition_dim = dim


def is_split(parameter: Tensor) -> bool:
    """Whether the parameter is a slice of a tensor split over tp."""
    return getattr(parameter, "tensor_model_parallel", False)


def local_shape(parameter: Tensor) -> list[int]:
    """The shape of this tensor-parallel rank's slice. ZeRO 3 empties the tensor and keeps the shape in `ds_shape`."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def embedding(num_embeddings: int, hidden_size: int, layout: Layout) -> VocabParallelEmbedding:
    """An uninitialised embedding [V, H] split by rows, [V/tp, H] per rank; V must be divisible by tp."""
    config = ModelParallelConfig(
        tensor_model_parallel_size=layout.tp_size,
        use_cpu_initialization=True,
        perform_initialization=False,  # model.init_weights fills it
        params_dtype=torch.float32,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
    )
    table = VocabParallelEmbedding(
        num_embeddings, hidden_size, init_method=nn.init.zeros_, config=config, tp_group=layout.tp_group
    )
    mark_split(table.weight, dim=0)
    return table


class ColumnLinear(nn.Module):
    """Uninitialised column-parallel layer (Shoeybi et al. 2019, section 3): weight [out/tp, in], bias [out/tp]."""

    def __init__(self, in_size: int, out_size: int, layout: Layout):
        super().__init__()
        self.layout = layout
        self.weight = nn.Parameter(torch.empty(out_size // layout.tp_size, in_size))
        self.bias = nn.Parameter(torch.empty(out_size // layout.tp_size))
        mark_split(self.weight, dim=0)
        mark_split(self.bias, dim=0)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out/tp]; under sequence parallelism x is [T/tp, in]."""
        return linear(x, self.weight, self.bias, self.layout, self.layout.sequence_parallel)


class RowLinear(nn.Module):
    """Uninitialised row-parallel layer: weight [out, in/tp]; bias [out], which is whole on every rank."""

    def __init__(self, in_size: int, out_size: int, layout: Layout):
        super().__init__()
        self.layout = layout
        self.weight = nn.Parameter(torch.empty(out_size, in_size // layout.tp_size))
        self.bias = nn.Parameter(torch.empty(out_size))
        mark_split(self.weight, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in/tp] -> [T, out], summed over tp (Megatron's g); under sequence parallelism [T/tp, out]."""
        if self.layout.tp_size == 1:
            return linear(x, self.weight, self.bias, self.layout)
        partial = F.linear(x, self.weight)
        if self.layout.sequence_parallel:
            return Exchange.apply(partial, self.layout.tp_group, sum_rows, gather_rows) + shared(self.bias, self.layout)
        return reduce_from_tensor_model_parallel_region(partial, self.layout.tp_group) + self.bias


def joined_linear(x: Tensor, layers: Sequence[ColumnLinear]) -> Tensor:
    """The concatenated outputs of several column-parallel layers for one input: [T, in] -> [T, sum of their out/tp].

    One product is faster than several, and the input's gradient is summed over tp only once.
    """
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    return linear(x, weight, bias, layers[0].layout, layers[0].layout.sequence_parallel)


def linear(x: Tensor, weight: Tensor, bias: Tensor, layout: Layout, is_split: bool = False) -> Tensor:
    """x [T, in], weight [out/tp, in], bias [out/tp] -> [T, out/tp]. The gradient of x is summed over tp, as in
    Megatron's f (Shoeybi et al. 2019, section 3). If `is_split`, x is this rank's rows [T/tp, in].
    """
    return Linear.apply(x, weight, bias, layout, is_split)


class Linear(torch.autograd.Function):
    """`linear` with communication that overlaps the matrix products (Korthikanti et al. 2022, section 4.2.2).

    The gradient of x is summed while that of the weight is computed. Gathered rows are not kept: the backward pass
    gathers them again while it computes the gradient of x. The weight itself is saved rather than a view, which under
    ZeRO 3 would hold the gathered weight in memory.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, layout: Layout, is_split: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layout, ctx.is_split = layout, is_split
        if is_split:
            x = gather_rows(x, layout.tp_group)
        elif x.device.type == "cpu":  # as fast as below, and bit-identical to earlier runs
            return F.linear(x, weight) + bias
        return F.linear(x, weight, bias)  # on a GPU the bias is added inside the product

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (x, weight), group = ctx.saved_tensors, ctx.layout.tp_group
        gathering = start_gather(x, group) if ctx.is_split else None
        x_gradient, summing = gradient @ weight, None  # [T, in], this rank's part of the sum
        if ctx.is_split:
            x = finished(gathering)
            summing = start_sum(x_gradient, group)
        elif ctx.layout.tp_size > 1:
            summing = x_gradient, dist.all_reduce(x_gradient, group=group, async_op=True)
        weight_gradient = gradient.t() @ x
        x_gradient = finished(summing) if summing else x_gradient
        return x_gradient, weight_gradient, gradient.sum(0), None, None


# Sequence parallelism (Korthikanti et al. 2022, section 4.2.2). Megatron's mappings allocate on
# `torch.cuda.current_device()`; these run on every device.


def start_gather(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """Start the all-gather of the ranks' [T/tp, ...] into [T, ...]; `finished` waits for the result."""
    whole = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    return whole, all_gather_single(whole, x.contiguous(), group=group, async_op=True)


def start_sum(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """Start the reduce-scatter of [T, ...] into this rank's [T/tp, ...] of the sum; `finished` waits for the result."""
    rows = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    return rows, reduce_scatter_single(rows, x.contiguous(), group=group, async_op=True)


def finished(started: tuple[Tensor, dist.Work]) -> Tensor:
    """Wait for a collective and return its result."""
    tensor, work = started
    work.wait()
    return tensor


def gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T/tp, H] -> [T, H], the rows of all ranks."""
    return finished(start_gather(x, group))


def sum_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T, H] -> [T/tp, H], this rank's rows of the sum over tp."""
    return finished(start_sum(x, group))


def own_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T, H] -> [T/tp, H], this rank's rows of a tensor that all ranks have."""
    return x.chunk(group.size())[group.rank()].clone()


class Exchange(torch.autograd.Function):
    """Moves rows between ranks by one of the three functions above, and their gradient by another."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup, move: Callable, move_back: Callable) -> Tensor:
        ctx.group, ctx.move_back = group, move_back
        return move(x, group)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.move_back(gradient, ctx.group), None, None, None


def add_rows(x: Tensor, count: int) -> Tensor:
    """x [T, H] followed by `count` rows of zeros; x itself, not a copy, if `count` is 0."""
    return F.pad(x, (0, 0, 0, count)) if count else x


def first_rows(x: Tensor, count: int) -> Tensor:
    """The first `count` rows of x [T, H]; x itself if it has no more, which avoids a copy of its gradient too."""
    return x[:count] if len(x) > count else x


def split_tokens(hidden: Tensor, layout: Layout) -> Tensor:
    """[T, H] -> [T/tp, H] under sequence parallelism, after adding zero rows so that tp divides T; else unchanged."""
    if not layout.sequence_parallel:
        return hidden
    padded = add_rows(hidden, -len(hidden) % layout.tp_size)
    return Exchange.apply(padded, layout.tp_group, own_rows, gather_rows)


def join_tokens(hidden: Tensor, num_tokens: int, layout: Layout) -> Tensor:
    """[T/tp, H] -> [T, H] under sequence parallelism, without the rows that `split_tokens` added; else unchanged.

    All ranks compute what follows, so each has the whole gradient and keeps its own rows.
    """
    if not layout.sequence_parallel:
        return hidden
    return first_rows(Exchange.apply(hidden, layout.tp_group, gather_rows, own_rows), num_tokens)


def shared(parameter: Tensor, layout: Layout) -> Tensor:
    """A replicated parameter that is applied to split tokens. Under sequence parallelism each rank has the gradient of
    its own rows; autograd sums these over tp because DeepSpeed would not.
    """
    if not layout.sequence_parallel:
        return parameter
    return copy_to_tensor_model_parallel_region(parameter, layout.tp_group)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over H (Ba et al. 2016), on [T, H] or, under sequence parallelism, on [T/tp, H]."""

    def __init__(self, hidden_size: int, eps: float, layout: Layout):
        super().__init__(hidden_size, eps)
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = shared(self.weight, self.layout), shared(self.bias, self.layout)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def prediction_loss(logits: Tensor, labels: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Cross entropy in nats [P], and whether the label has the highest logit [P]; logits: this rank's [P, V/tp]."""
    correct = is_highest(logits, labels, layout)  # first, because Megatron's cross entropy overwrites the logits
    return vocab_parallel_cross_entropy(logits, labels), correct


@torch.no_grad()
def is_highest(logits: Tensor, labels: Tensor, layout: Layout) -> Tensor:
    """[P] bool: whether the label has the highest of all V logits; logits: this rank's [P, V/tp]."""
    group = layout.tp_group
    best, index = logits.max(-1)  # [P] each
    highest = best.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    mine = ((best == highest) & (index + layout.tp_rank * logits.shape[1] == labels)).int()
    dist.all_reduce(mine, group=group)
    return mine > 0
