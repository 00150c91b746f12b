"""Scaled dot-product attention within each sequence of a micro-batch. `self_attention` takes one of two paths:

    unpadded_attention    torch's variable-length GPU kernels: flash in bf16 and fp16, otherwise memory-efficient
    padded_attention      pads to [B, S] and masks the padding: on CPUs, and on GPUs where the kernels do not apply

Both support dropout. Shapes follow the legend in model.py.

The kernels are called as private operators of torch because both public interfaces fall short.
`torch.nn.attention.varlen` has no dropout. Jagged tensors take 80 % of the host's time per step and rule out
recomputation, because every call creates a new ragged size. An operator whose arguments have changed in another version
of torch is not called (`find_operator`).
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.layers import Sequences, add_rows, first_rows, seed_dropout

MAX_HEAD_SIZE = 256  # limit of flash attention, which also needs a multiple of 8


def find_operator(name: str, arguments: str):
    """`torch.ops.aten.<name>`, or None if this torch has no such operator with these positional arguments."""
    operator = getattr(getattr(torch.ops.aten, name, None), "default", None)
    if operator is None:
        return None
    found = [argument.name for argument in operator._schema.arguments if not argument.kwarg_only]
    return operator if found == arguments.split() else None


FLASH = find_operator(
    "_flash_attention_forward",
    "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask",
)
MEMORY_EFFICIENT = find_operator(
    "_efficient_attention_forward",
    "query key value bias cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p custom_mask_type"
    " compute_log_sumexp",
)


def self_attention(qkv: Tensor, num_heads: int, sequences: Sequences, probability: float, seed: tuple | None) -> Tensor:
    """Scaled dot-product attention within each sequence (Vaswani et al. 2017, section 3.2.1).

    Args:
        qkv: [T, 3 * N/tp * D], queries, keys and values concatenated
        num_heads: N/tp
        probability: dropout of the attention weights
        seed: of the dropout, including the tp rank because heads are split over tp; None switches dropout off

    Returns [T, N/tp * D].
    """
    num_rows, num_tokens = len(qkv), len(sequences.token_ids)  # sequence parallelism adds rows so that tp divides T
    qkv = first_rows(qkv, num_tokens).view(num_tokens, 3, num_heads, -1)  # [T, 3, N/tp, D]
    if seed is None:
        probability = 0.0
    elif probability > 0:
        seed_dropout(seed, qkv.device)
    attend = unpadded_attention if has_kernel(qkv) else padded_attention
    context = attend(qkv, sequences, probability).reshape(num_tokens, -1)  # [T, N/tp * D]
    return add_rows(context, num_rows - num_tokens)


def padded_attention(qkv: Tensor, sequences: Sequences, probability: float) -> Tensor:
    """Attention over the rectangle [B, S] with masked padding: [T, 3, N/tp, D] -> [T, N/tp, D]."""
    index = sequences.padded_index
    batch, longest = sequences.num_sequences, sequences.max_seqlen
    mask = None
    if index is not None:
        qkv = qkv.new_zeros(batch * longest, *qkv.shape[1:]).index_copy(0, index, qkv)  # [B * S, 3, N/tp, D]
        lengths = torch.diff(sequences.cu_seqlens)
        mask = (torch.arange(longest, device=qkv.device) < lengths[:, None])[:, None, None]  # [B, 1, 1, S]
    query, key, value = qkv.unflatten(0, (batch, longest)).permute(2, 0, 3, 1, 4)  # each [B, N/tp, S, D]
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=probability)
    context = context.transpose(1, 2).flatten(0, 1)  # [B * S, N/tp, D]
    return context if index is None else context[index]


def has_kernel(qkv: Tensor) -> bool:
    """Whether a variable-length kernel can compute the attention of qkv [T, 3, N/tp, D].

    On a GPU where none can, a warning gives the reason.
    """
    if qkv.device.type == "cpu":
        return False
    head_size = qkv.shape[-1]
    if FLASH is None or MEMORY_EFFICIENT is None:
        reason = f"torch {torch.__version__} has changed its variable-length kernels"
    elif head_size % 8 or head_size > MAX_HEAD_SIZE:
        reason = f"no variable-length kernel for heads of size {head_size}: not a multiple of 8 up to {MAX_HEAD_SIZE}"
    else:
        return True
    warnings.warn(f"{reason}; attention computes the padding too, which is slower", stacklevel=2)
    return False


def runs_flash(qkv: Tensor) -> bool:
    """Whether flash attention computes qkv: in 16 bits, on a GPU of compute capability 8.0 (A100) or higher."""
    if qkv.dtype not in (torch.bfloat16, torch.float16):
        return False
    if not (qkv.is_cuda and torch.cuda.is_initialized()):
        return True  # assume such a GPU for the meta device and fake tensors
    is_new = torch.cuda.get_device_capability(qkv.device) >= (8, 0)
    return is_new and torch.backends.cuda.is_flash_attention_available()


def unpadded_attention(qkv: Tensor, sequences: Sequences, probability: float) -> Tensor:
    """Attention without padding, by torch's variable-length GPU kernels: [T, 3, N/tp, D] -> [T, N/tp, D]."""
    starts, longest = sequences.cu_seqlens, sequences.max_seqlen
    query, key, value = qkv.unbind(1)  # views, each [T, N/tp, D]
    if runs_flash(qkv):
        return FLASH(query, key, value, starts, starts, longest, longest, probability, False, False)[0]
    query, key, value = query[None], key[None], value[None]  # [1, T, N/tp, D]
    no_mask, keeps_sums = 0, qkv.requires_grad  # the backward pass needs the softmax's log-sum-exp
    context = MEMORY_EFFICIENT(
        query, key, value, None, starts, starts, longest, longest, probability, no_mask, keeps_sums
    )[0]
    return context.squeeze(0)
