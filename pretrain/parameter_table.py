"""Every tensor of the model by name, its whole shape and how tensor parallelism splits it: a table made from the
configuration alone, for what has to know before a model is built or a rank started.

Two columns of `tensor_table` for a model of H = 128, F = 512, V = 30,522:

    bert.embeddings.word_embeddings.weight                  (30522, 128)    split along 0, its rows padded
    bert.encoder.layer.0.attention.self.query.weight        (128, 128)      split along 0
    bert.encoder.layer.0.attention.output.dense.weight      (128, 128)      split along 1
    bert.encoder.layer.0.attention.output.dense.bias        (128,)          whole on every rank
"""

import math
from typing import NamedTuple

from pretrain.model_config import ModelConfig

POSITIONS = "bert.embeddings.position_embeddings.weight"  # if sinusoidal no parameter, but in files all the same
# What fine-tuned or partly saved models may lack: it can be learned anew while the encoder is kept.
HEADS = ("cls.", "bert.pooler.")


class TensorShape(NamedTuple):
    """The shape of a whole tensor, and the dimension along which tensor parallelism splits it (None: every rank has the
    whole tensor).
    """

    shape: tuple[int, ...]
    split_dim: int | None


def tensor_table(config: ModelConfig) -> dict[str, TensorShape]:
    """All parameters of the model by name, in its own order."""
    hidden, wide, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    before = hidden if config.pre_layer_norm else 0
    after = hidden - before
    table = {"bert.embeddings.word_embeddings.weight": TensorShape((vocab, hidden), 0)}
    if config.position_embedding_type == "absolute":
        table[POSITIONS] = TensorShape((config.max_position_embeddings, hidden), None)
    table["bert.embeddings.token_type_embeddings.weight"] = TensorShape((config.type_vocab_size, hidden), None)
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
    table["cls.predictions.bias"] = TensorShape((vocab,), 0)
    table |= _linear("cls.predictions.transform.dense", hidden, hidden)
    table |= _layer_norm("cls.predictions.transform.LayerNorm", hidden)
    return table | (_linear("cls.seq_relationship", 2, hidden) if config.has_pair_head else {})


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the model with its heads: the tied decoder counted once, the vocabulary not padded."""
    return sum(math.prod(whole.shape) for whole in tensor_table(config).values())


def _linear(name: str, out_size: int, in_size: int, split: int | None = None) -> dict[str, TensorShape]:
    """A bias is split only with the rows: with the columns, every rank adds it to the same sum."""
    weight, bias = TensorShape((out_size, in_size), split), TensorShape((out_size,), 0 if split == 0 else None)
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def _layer_norm(name: str, size: int) -> dict[str, TensorShape]:
    """Two vectors; none where no LayerNorm stands (size 0)."""
    return {f"{name}.{part}": TensorShape((size,), None) for part in ("weight", "bias") if size}


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has a row for each token: these rows are padded to a multiple of 128 x tp."""
    return name.endswith(("word_embeddings.weight", "predictions.bias"))


def rank_shape(name: str, whole: TensorShape, config: ModelConfig, tp_size: int) -> tuple[int, ...]:
    """Shape of the part of a tensor that one of `tp_size` tensor-parallel ranks holds."""
    shape = list(whole.shape)
    if is_vocabulary(name):
        shape[0] = config.padded_vocab_size(tp_size)
    if whole.split_dim is not None:
        shape[whole.split_dim] //= tp_size
    return tuple(shape)
