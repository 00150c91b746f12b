"""Every tensor of the model with its whole shape and tensor-parallel split, from the configuration alone.

Examples from `tensor_table` for a model of H = 128, F = 512, V = 30,522:

    bert.embeddings.word_embeddings.weight                  (30522, 128)    split along 0, its rows padded
    bert.encoder.layer.0.attention.self.query.weight        (128, 128)      split along 0
    bert.encoder.layer.0.attention.output.dense.weight      (128, 128)      split along 1
    bert.encoder.layer.0.attention.output.dense.bias        (128,)          whole on every rank
"""

import math
from typing import NamedTuple

from pretrain.model_config import ModelConfig

POSITIONS = "bert.embeddings.position_embeddings.weight"  # not a parameter if sinusoidal, but still in weight files
HEADS = ("cls.", "bert.pooler.")  # may be missing from fine-tuned or partly saved models; they can be retrained


class WholeTensor(NamedTuple):
    """The shape of a whole tensor, and the dimension along which tensor parallelism splits it (None: not split)."""

    shape: tuple[int, ...]
    split_dim: int | None


def tensor_table(config: ModelConfig) -> dict[str, WholeTensor]:
    """All parameters of the model by name, in the model's order."""
    hidden, wide, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    before = hidden if config.pre_layer_norm else 0
    after = hidden - before
    table = {"bert.embeddings.word_embeddings.weight": WholeTensor((vocab, hidden), 0)}
    if config.position_embedding_type == "absolute":
        table[POSITIONS] = WholeTensor((config.max_position_embeddings, hidden), None)
    table["bert.embeddings.token_type_embeddings.weight"] = WholeTensor((config.type_vocab_size, hidden), None)
    table |= _layer_norm("bert.embeddings.LayerNorm", after)
    for index in range(config.num_hidden_layers):
        layer = f"bert.encoder.layer.{index}"
        table |= _layer_norm(f"{layer}.attention.ln", before)
        for name in ("query", "key", "value"):
            table |= _linear(f"{layer}.attention.self.{name}", hidden, hidden, split=0)
        table |= _linear(f"{layer}.attention.output.dense", hidden, hidden, split=1)
        table |= _layer_norm(f"{layer}.attention.output.LayerNorm", after)
        table |= _layer_norm(f"{layer}.ln", before)
        table |= _linear(f"{layer}.intermediate.dense", wide, hidden, split=0)
        table |= _linear(f"{layer}.output.dense", hidden, wide, split=1)
        table |= _layer_norm(f"{layer}.output.LayerNorm", after)
    table |= _layer_norm("bert.encoder.ln", before)
    if config.has_pair_head:
        table |= _linear("bert.pooler.dense", hidden, hidden)
    table["cls.predictions.bias"] = WholeTensor((vocab,), 0)
    table |= _linear("cls.predictions.transform.dense", hidden, hidden)
    table |= _layer_norm("cls.predictions.transform.LayerNorm", hidden)
    return table | (_linear("cls.seq_relationship", 2, hidden) if config.has_pair_head else {})


def num_parameters(config: ModelConfig) -> int:
    """The number of parameters with heads, without vocabulary padding. The tied decoder counts once."""
    return sum(math.prod(whole.shape) for whole in tensor_table(config).values())


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has one row per token. These rows are padded to a multiple of 128 x tp."""
    return name.endswith(("word_embeddings.weight", "predictions.bias"))


def rank_shape(name: str, whole: WholeTensor, config: ModelConfig, tp_size: int) -> tuple[int, ...]:
    """The shape of a tensor's slice on one of `tp_size` tensor-parallel ranks."""
    shape = list(whole.shape)
    if is_vocabulary(name):
        shape[0] = config.padded_vocab_size(tp_size)
    if whole.split_dim is not None:
        shape[whole.split_dim] //= tp_size
    return tuple(shape)


def _linear(name: str, out_size: int, in_size: int, split: int | None = None) -> dict[str, WholeTensor]:
    """A weight and its bias. The bias is split with rows only: if columns are split, it is added to their sum."""
    return {
        f"{name}.weight": WholeTensor((out_size, in_size), split),
        f"{name}.bias": WholeTensor((out_size,), 0 if split == 0 else None),
    }


def _layer_norm(name: str, size: int) -> dict[str, WholeTensor]:
    """Weight and bias, or nothing if `size` is 0 because this kind of BERT has no LayerNorm there."""
    return {f"{name}.{part}": WholeTensor((size,), None) for part in ("weight", "bias") if size}
