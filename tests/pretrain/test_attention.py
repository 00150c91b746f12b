"""Attention without padding against attention over the padded rectangle, and both against the formula; the GPU's path
through the whole model on the meta device, whose tensors have shapes and no values.

The variable-length kernels exist on GPUs only. `cpu_kernels` puts the formula in their place for a CPU, behind the same
operators, and checks what they require of their arguments.
"""

import warnings

import numpy as np
import pytest
import torch

from benchmarks.work import meta_step
from pretrain import attention
from pretrain.attention import has_kernel, padded_attention, self_attention, unpadded_attention
from pretrain.data import pack_sequences
from pretrain.layers import Sequences, derive_seed, dropout
from pretrain.layout import init_layout
from pretrain.model_config import ModelConfig
from tests.ranks import run_ranks

CONFIG = ModelConfig(vocab_size=300, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128)
LENGTHS = [5, 512, 77, 1, 300]
NUM_HEADS, HEAD_SIZE = 2, 16


def make_sequences(lengths: list[int]) -> Sequences:
    lengths = np.array(lengths)
    return pack_sequences(np.zeros(lengths.sum(), np.int64), lengths, lengths)


def make_qkv(lengths: list[int], dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """[T, 3, N, D], the same numbers for every type and device."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, NUM_HEADS, HEAD_SIZE, generator=generator)
    return qkv.to(device, dtype).requires_grad_()


def formula(qkv: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """softmax(Q K' / sqrt(D)) V, one sequence and head after the other (Vaswani et al. 2017, equation 1)."""
    context = []
    for part in qkv.split(lengths):
        scores = torch.einsum("ind,jnd->nij", part[:, 0], part[:, 1]) / HEAD_SIZE**0.5
        context.append(torch.einsum("nij,jnd->ind", scores.softmax(-1), part[:, 2]))
    return torch.cat(context)


def context_and_gradient(attend, qkv: torch.Tensor, *args) -> tuple[torch.Tensor, torch.Tensor]:
    context = attend(qkv, *args)
    weights = torch.linspace(-1, 1, context.numel(), device=qkv.device).view(context.shape)
    (context.float() * weights).sum().backward()
    gradient, qkv.grad = qkv.grad, None
    return context.detach().float(), gradient.float()


def sequences_of(starts: torch.Tensor, longest: int, *parts: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Slices of [T, N, D] by sequence, in float32, once the arguments are what the kernels take."""
    assert starts.dtype == torch.int32 and longest >= starts.diff().max() and starts[-1] == len(parts[0])
    assert all(part.stride(-1) == 1 and part.shape[-1] % 8 == 0 for part in parts)
    return list(zip(*(part.float().split(starts.diff().tolist()) for part in parts), strict=True))


def softmax(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return (torch.einsum("ind,jnd->nij", query, key) / HEAD_SIZE**0.5).softmax(-1)


def kernel_forward(query, key, value, starts, longest) -> torch.Tensor:
    slices = sequences_of(starts, longest, query, key, value)
    return torch.cat([torch.einsum("nij,jnd->ind", softmax(q, k), v) for q, k, v in slices]).to(query.dtype)


def kernel_backward(gradient, query, key, value, starts, longest) -> list[torch.Tensor]:
    gradients = []
    for g, q, k, v in sequences_of(starts, longest, gradient, query, key, value):
        weights, of_weights = softmax(q, k), torch.einsum("ind,jnd->nij", g, v)
        scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) / HEAD_SIZE**0.5
        parts = (("nij,jnd->ind", scores, k), ("nij,ind->jnd", scores, q), ("nij,ind->jnd", weights, g))
        gradients.append([torch.einsum(*part) for part in parts])
    return [torch.cat(parts).to(query.dtype) for parts in zip(*gradients, strict=True)]


def flash_forward(query, key, value, starts, starts_k, longest, longest_k, probability, is_causal, debug):
    assert query.dtype in (torch.bfloat16, torch.float16) and not (probability or is_causal or debug)
    context = kernel_forward(query, key, value, starts, longest)
    return context, *(torch.zeros(1) for _ in range(4))


def flash_backward(gradient, query, key, value, context, sums, starts, starts_k, longest, *rest, **options):
    return tuple(kernel_backward(gradient, query, key, value, starts, longest))


def efficient_forward(query, key, value, bias, starts, starts_k, longest, longest_k, probability, mask, sums):
    assert query.dtype == torch.float32 and len(query) == 1 and bias is None and not (probability or mask)
    context = kernel_forward(query[0], key[0], value[0], starts, longest)[None]
    return context, *(torch.zeros(1) for _ in range(3)), longest, longest


def efficient_backward(gradient, query, key, value, bias, context, starts, starts_k, longest, *rest, **options):
    gradients = kernel_backward(gradient[0], query[0], key[0], value[0], starts, longest)
    return (*(part[None] for part in gradients), torch.zeros(1))


@pytest.fixture(scope="module")
def cpu_kernels():
    kernels = {
        "_flash_attention_forward": flash_forward,
        "_flash_attention_backward": flash_backward,
        "_efficient_attention_forward": efficient_forward,
        "_efficient_attention_backward": efficient_backward,
    }
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in kernels.items():
        library.impl(name, kernel, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("lengths", [LENGTHS, [64, 64]], ids=["5 to 512", "equal"])
def test_padded_attention_equals_the_formula(lengths):
    """Measured: 3.3e-7 in the output, 7.2e-7 in the gradient."""
    qkv = make_qkv(lengths)
    expected = context_and_gradient(formula, qkv, lengths)
    found = context_and_gradient(padded_attention, qkv, make_sequences(lengths), 0.0)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_unpadded_attention_calls_the_kernels_as_they_are_meant(dtype, tolerance, cpu_kernels):
    """Each precision its kernel, forward and backward."""
    qkv = make_qkv(LENGTHS, dtype)
    expected = context_and_gradient(formula, make_qkv(LENGTHS), LENGTHS)
    found = context_and_gradient(unpadded_attention, qkv, make_sequences(LENGTHS), 0.0)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def run_on_meta(tensor_parallel: int, sequence_parallel: bool) -> None:
    """Forward and backward on the GPU's path in each precision, kept and recomputed; 17 tokens, so that a row is added
    at tp 2.
    """
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    kinds = [(fp32, "none"), (fp32, "full"), (bf16, "none"), (bf16, "selective"), (fp16, "full")]
    layout = init_layout(tensor_parallel, sequence_parallel)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as the one that says that there is no kernel
        for dtype, recompute in kinds:
            meta_step(layout, CONFIG, dtype, [5, 12], recompute)()


@pytest.mark.parametrize(("tensor_parallel", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_the_path_of_a_gpu_runs_and_can_be_recomputed(tensor_parallel, sequence_parallel):
    run_ranks(run_on_meta, tensor_parallel, tensor_parallel, sequence_parallel)


def test_a_gpu_without_a_kernel_says_so_and_pads(monkeypatch):
    sequences = make_sequences([5, 8]).to(torch.device("meta"))
    for head_size in (20, 264):
        qkv = torch.empty(13, 3 * 2 * head_size, device="meta")
        with pytest.warns(UserWarning, match=f"heads of size {head_size}"):
            assert self_attention(qkv, 2, sequences, 0.1, (1,)).shape == (13, 2 * head_size)
    monkeypatch.setattr(attention, "FLASH", attention.find_operator("_flash_attention_forward", "query key value"))
    with pytest.warns(UserWarning, match="has changed its variable-length kernels"):
        assert not has_kernel(torch.empty(13, 3, 2, 16, device="meta"))
    assert attention.find_operator("_no_such_operator", "query") is None


def test_only_one_generator_is_seeded_and_the_bits_are_those_of_manual_seed():
    x, seed = torch.ones(50, 7), (1, 2, "output")
    found = dropout(x, 0.3, seed)
    torch.manual_seed(derive_seed(*seed))
    assert torch.equal(found, torch.nn.functional.dropout(x, 0.3))


def test_dropout_keeps_the_mean_and_is_a_function_of_the_seed():
    """Weights that sum to 1 over values that are 1: the output is the sum of what is kept, 1 on average."""
    qkv = torch.ones(sum(LENGTHS), 3 * NUM_HEADS * HEAD_SIZE)
    sequences = make_sequences(LENGTHS)
    first, again, other = (self_attention(qkv, NUM_HEADS, sequences, 0.1, seed) for seed in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.std() > 0.01 and first.mean() == pytest.approx(1, abs=0.01)
    assert torch.equal(self_attention(qkv, NUM_HEADS, sequences, 0.1, None), torch.ones(sum(LENGTHS), 32))


def test_rows_that_make_tokens_divisible_are_no_tokens():
    """Sequence parallelism adds rows at the end: none attends to them, and what stands there comes back as zeros."""
    sequences, qkv = make_sequences([5, 8]), make_qkv([5, 8]).detach().flatten(1)  # [13, 3 * N * D]
    longer = torch.cat([qkv, torch.full((3, qkv.shape[1]), torch.inf)])
    context = self_attention(longer, NUM_HEADS, sequences, 0.0, None)
    assert torch.equal(context[:13], self_attention(qkv, NUM_HEADS, sequences, 0.0, None))
    assert torch.equal(context[13:], torch.zeros(3, NUM_HEADS * HEAD_SIZE))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_both_paths_agree_on_the_gpu(dtype, tolerance):
    sequences, qkv = make_sequences(LENGTHS).to("cuda"), make_qkv(LENGTHS, dtype, "cuda")
    paths = (context_and_gradient(attend, qkv, sequences, 0.0) for attend in (padded_attention, unpadded_attention))
    for padded, unpadded in zip(*paths, strict=True):
        torch.testing.assert_close(unpadded, padded, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_without_padding_on_the_gpu(dtype):
    qkv = torch.ones(sum(LENGTHS), 3 * NUM_HEADS * HEAD_SIZE, dtype=dtype, device="cuda")
    sequences = make_sequences(LENGTHS).to("cuda")
    first, again = (self_attention(qkv, NUM_HEADS, sequences, 0.1, (1, 2)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.std() > 0.01 and first.float().mean().item() == pytest.approx(1, abs=0.01)
