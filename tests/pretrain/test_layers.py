"""Attention without padding against attention over the padded rectangle, and both against the formula."""

import numpy as np
import pytest
import torch

from pretrain.data import pack_sequences
from pretrain.layers import Sequences, padded_attention, self_attention, unpadded_attention

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


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # what the CPU's form of it is made of
@pytest.mark.parametrize("attend", [padded_attention, unpadded_attention])
@pytest.mark.parametrize("lengths", [LENGTHS, [64, 64]], ids=["5 to 512", "equal"])
def test_equals_the_formula(attend, lengths):
    """Measured: 3.3e-7 in the output, 7.2e-7 in the gradient."""
    qkv = make_qkv(lengths)
    expected = context_and_gradient(formula, qkv, lengths)
    for ours, theirs in zip(context_and_gradient(attend, qkv, make_sequences(lengths), 0.0), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


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
