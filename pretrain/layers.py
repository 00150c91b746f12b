"""Megatron's parallel layers as this model uses them, attention, and dropout that needs no generator state.

Shapes follow the legend in model.py. Activations are flat: [T, H], the T real tokens of a micro-batch behind one
another, so padding is never computed; only attention, which needs a rectangle, pads to [B, S] and drops the padding
again.
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.layout import Layout  # before megatron-core: it keeps that import quiet

# isort: split
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce


@dataclass
class Sequences:
    """A micro-batch of B sequences without padding, as the encoder reads it."""

    token_ids: Tensor  # [T] int64
    segment_ids: Tensor  # [T] int64, 0 or 1
    position_ids: Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: Tensor  # [B+1] int32, where each sequence starts in T; the last entry is T
    max_seqlen: int  # S, the longest of them

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def padded_index(self) -> Tensor | None:
        """[T] Where each token stands in the padded [B * S]; None when no sequence is shorter than S."""
        if len(self.token_ids) == self.num_sequences * self.max_seqlen:
            return None
        starts = self.cu_seqlens[:-1].long()
        sequence = torch.repeat_interleave(torch.diff(self.cu_seqlens).long(), output_size=len(self.token_ids))
        return torch.arange(len(self.token_ids), device=starts.device) - starts[sequence] + sequence * self.max_seqlen

    def to(self, device: torch.device) -> "Sequences":
        tensors = (self.token_ids, self.segment_ids, self.position_ids, self.cu_seqlens)
        return Sequences(*(tensor.to(device, non_blocking=True) for tensor in tensors), self.max_seqlen)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a function of all parts: what is random depends on where and when it is used, never on what
    ran before.
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def dropout(x: Tensor, probability: float, seed: tuple | None) -> Tensor:
    """Dropout whose mask is a function of `seed`; none when the seed is None (evaluation)."""
    if seed is None or probability == 0:
        return x
    torch.manual_seed(derive_seed(*seed))
    return F.dropout(x, probability)


def parallel_config(layout: Layout) -> ModelParallelConfig:
    """How Megatron's layers are built: on the CPU, empty (model.init_weights fills them), float32."""
    return ModelParallelConfig(
        tensor_model_parallel_size=layout.tp_size,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.float32,
    )


def embedding(num_embeddings: int, hidden_size: int, layout: Layout) -> VocabParallelEmbedding:
    """A table [V, H] split over its rows, [V/tp, H] a rank; V is padded so that it divides."""
    table = VocabParallelEmbedding(
        num_embeddings,
        hidden_size,
        init_method=nn.init.zeros_,
        config=parallel_config(layout),
        tp_group=layout.get_tensor_model_parallel_group(),
    )
    mark_split(table.weight, dim=0)
    return table


def column_linear(in_size: int, out_size: int, layout: Layout) -> ColumnParallelLinear:
    """[T, in] -> [T, out/tp]: the weight [out, in] is split over its rows.

    Megatron's f: the input's gradient is summed over tp.
    """
    linear = ColumnParallelLinear(
        in_size,
        out_size,
        config=parallel_config(layout),
        init_method=nn.init.zeros_,
        bias=True,
        gather_output=False,
        tp_group=layout.get_tensor_model_parallel_group(),
    )
    mark_split(linear.weight, dim=0)
    mark_split(linear.bias, dim=0)
    return linear


def row_linear(in_size: int, out_size: int, layout: Layout) -> RowParallelLinear:
    """[T, in/tp] -> [T, out]: the weight [out, in] is split over its columns.

    Megatron's g: the output is summed over tp.
    """
    linear = RowParallelLinear(
        in_size,
        out_size,
        config=parallel_config(layout),
        init_method=nn.init.zeros_,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=layout.get_tensor_model_parallel_group(),
    )
    mark_split(linear.weight, dim=1)
    return linear


def mark_split(parameter: nn.Parameter, dim: int) -> None:
    """Says that this rank holds a slice along `dim`: initialisation, LAMB, checkpoints and DeepSpeed's gradient norm
    read it.
    """
    parameter.tensor_model_parallel = True
    parameter.partition_dim = dim


def is_split(parameter: Tensor) -> bool:
    """Whether the parameter is a slice of a tensor that is split over tp."""
    return getattr(parameter, "tensor_model_parallel", False)


def column_product(x: Tensor, weight: Tensor, bias: Tensor, layout: Layout) -> Tensor:
    """[T, in] x [out/tp, in] -> [T, out/tp], with Megatron's f: what `column_linear` computes, for weights that stand
    elsewhere.
    """
    return linear_with_grad_accumulation_and_async_allreduce(
        x,
        weight,
        bias,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=layout.tp_size > 1,
        sequence_parallel=False,
        tp_group=layout.get_tensor_model_parallel_group(),
    )


def self_attention(qkv: Tensor, num_heads: int, sequences: Sequences, probability: float, seed: tuple | None) -> Tensor:
    """Scaled dot-product attention inside each sequence (Vaswani et al. 2017, 3.2.1).

    qkv: [T, 3 * N/tp * D], queries, keys and values side by side; `num_heads` is N/tp. Returns [T, N/tp * D].
    `probability` is the dropout of the attention weights; heads are split over tp, so `seed` must name the tp rank.
    """
    index = sequences.padded_index
    batch, longest = sequences.num_sequences, sequences.max_seqlen
    mask = None
    if index is not None:
        qkv = qkv.new_zeros(batch * longest, qkv.shape[1]).index_copy(0, index, qkv)  # [B * S, 3 * N/tp * D]
        lengths = torch.diff(sequences.cu_seqlens)
        mask = (torch.arange(longest, device=qkv.device) < lengths[:, None])[:, None, None]  # [B, 1, 1, S]
    query, key, value = qkv.view(batch, longest, 3, num_heads, -1).permute(2, 0, 3, 1, 4)  # each [B, N/tp, S, D]
    active = seed is not None and probability > 0
    if active:
        torch.manual_seed(derive_seed(*seed))
    context = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=probability if active else 0.0
    )
    context = context.transpose(1, 2).reshape(batch * longest, -1)  # [B * S, N/tp * D]
    return context if index is None else context[index]


def prediction_loss(logits: Tensor, labels: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Cross entropy in nats [P], and whether the label had the highest logit [P]; logits: this rank's [P, V/tp].

    The hits come first: Megatron's cross entropy overwrites the logits.
    """
    correct = is_highest(logits, labels, layout)
    return vocab_parallel_cross_entropy(logits, labels), correct


@torch.no_grad()
def is_highest(logits: Tensor, labels: Tensor, layout: Layout) -> Tensor:
    """[P] bool: whether the label has the highest of all V logits; logits: [P, V/tp], this rank's columns."""
    group = layout.get_tensor_model_parallel_group()
    best, index = logits.max(-1)  # [P] each
    highest = best.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    mine = ((best == highest) & (index + layout.tp_rank * logits.shape[1] == labels)).int()
    dist.all_reduce(mine, group=group)
    return mine > 0
