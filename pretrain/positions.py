"""Sinusoidal positions: constants, so not parameters, but part of weight files."""

import math

import torch
from torch import Tensor


def sinusoidal_positions(num_positions: int, hidden_size: int) -> Tensor:
    """[num_positions, H] Alternating sine and cosine (Vaswani et al. 2017, section 3.5), divided by sqrt(H).

    The paper instead multiplies word embeddings by sqrt(H) (section 3.4), but here they are also the decoder's weights.
    """
    rates = 10000.0 ** (-torch.arange(0, hidden_size, 2, dtype=torch.float64) / hidden_size)  # [H/2]
    angles = torch.arange(num_positions)[:, None] * rates  # [num_positions, H/2]
    return (torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1) / math.sqrt(hidden_size)).float()
