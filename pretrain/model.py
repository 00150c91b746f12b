"""BERT with its masked-language-model and pair heads (Devlin et al. 2019), split over tensor-parallel ranks as Megatron
splits a transformer (Shoeybi et al. 2019, section 3). At tp 1 the same code is an ordinary BERT.

Shape legend, used everywhere: B batch, S sequence, P predicted positions, T tokens of an unpadded batch, H hidden, N
heads, D head, F feed-forward, V vocabulary; `/tp` marks a dimension split over the tensor-parallel ranks. Between
tensor-parallel products, activations written [T, H] are [T/tp, H] under sequence parallelism.

Parameters are named as in Hugging Face's `BertForPreTraining`, with pre-LayerNorm as in `MegatronBertForPreTraining`,
so a conversion only merges slices. Q, K and V are parameters of their own (one LAMB trust ratio each) and are
concatenated in the forward pass: one product, one all-reduce of the input's gradient.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.attention import self_attention
from pretrain.layers import (
    ColumnLinear,
    LayerNorm,
    RowLinear,
    Sequences,
    derive_seed,
    dropout,
    embedding,
    is_split,
    join_tokens,
    joined_product,
    local_shape,
    mark_split,
    prediction_loss,
    split_tokens,
    sub_seed,
    whole_product,
)
from pretrain.layout import Layout
from pretrain.model_config import ModelConfig

RECOMPUTE = ("none", "selective", "full")


def activation(x: Tensor, name: str) -> Tensor:
    """GELU exact or by tanh (Hendrycks and Gimpel 2016), or ReLU."""
    return F.relu(x) if name == "relu" else F.gelu(x, approximate="tanh" if name == "gelu_new" else "none")


def call(function, *args, recompute: bool):
    """function(*args); with `recompute` what its backward pass needs is not kept but computed again (Chen et al. 2016).

    Dropout seeds itself, so no generator's state has to be kept either, and the gradients are the same bit for bit.
    """
    if not recompute:
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def layer_norm(config: ModelConfig, layout: Layout, here: bool) -> nn.Module:
    """LayerNorm if it stands `here` in this kind of BERT, else nothing."""
    return LayerNorm(config.hidden_size, config.layer_norm_eps, layout) if here else nn.Identity()


def sinusoidal_positions(num_positions: int, hidden_size: int) -> Tensor:
    """[num_positions, H] Sine and cosine by turns (Vaswani et al. 2017, section 3.5), divided by sqrt(H): the paper
    multiplies the words by it (3.4), but here they are the decoder's weights too.
    """
    rates = 10000.0 ** (-torch.arange(0, hidden_size, 2, dtype=torch.float64) / hidden_size)  # [H/2]
    angles = torch.arange(num_positions)[:, None] * rates  # [num_positions, H/2]
    return (torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1) / math.sqrt(hidden_size)).float()


class SinusoidalPositions(nn.Module):
    """Positions that are not learned, in the place of those that are."""

    def __init__(self, num_positions: int, hidden_size: int):
        super().__init__()
        self.register_buffer("weight", sinusoidal_positions(num_positions, hidden_size), persistent=False)

    def forward(self, position_ids: Tensor) -> Tensor:
        return self.weight[position_ids]


class Embeddings(nn.Module):
    """Words, positions and segments -> [T, H]."""

    def __init__(self, config: ModelConfig, layout: Layout):
        super().__init__()
        self.config, self.layout = config, layout
        self.word_embeddings = embedding(
            config.padded_vocab_size(layout.tp_size), config.hidden_size, layout
        )  # [V/tp, H]
        positions = SinusoidalPositions if config.position_embedding_type == "sinusoidal" else nn.Embedding
        self.position_embeddings = positions(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = layer_norm(config, layout, here=not config.pre_layer_norm)

    def forward(self, sequences: Sequences, seed: tuple | None) -> Tensor:
        words = self.word_embeddings(sequences.token_ids)
        positions = self.position_embeddings(sequences.position_ids).type_as(words)  # DeepSpeed casts weights alone
        segments = self.token_type_embeddings(sequences.segment_ids)
        hidden = split_tokens(words + positions + segments, self.layout)  # [T, H]
        return dropout(self.LayerNorm(hidden), self.config.hidden_dropout_prob, sub_seed(seed, "embeddings"))


class SelfAttention(nn.Module):
    """Multi-head self-attention over this rank's N/tp heads."""

    def __init__(self, config: ModelConfig, layout: Layout):
        super().__init__()
        self.config, self.layout = config, layout
        self.query = ColumnLinear(config.hidden_size, config.hidden_size, layout)  # [H/tp, H]
        self.key = ColumnLinear(config.hidden_size, config.hidden_size, layout)
        self.value = ColumnLinear(config.hidden_size, config.hidden_size, layout)
        self.recompute = False

    def forward(self, hidden: Tensor, sequences: Sequences, seed: tuple | None) -> Tensor:
        qkv = joined_product(hidden, (self.query, self.key, self.value))  # [T, 3 * H/tp]
        seed = sub_seed(seed, "attention", self.layout.tp_rank)
        num_heads = self.config.num_attention_heads // self.layout.tp_size
        probability = self.config.attention_probs_dropout_prob
        return call(self_attention, qkv, num_heads, sequences, probability, seed, recompute=self.recompute)  # [T, H/tp]


class ResidualOutput(nn.Module):
    """Row-parallel projection back to H, dropout, residual, and LayerNorm where it comes last (as in the paper)."""

    def __init__(self, in_size: int, config: ModelConfig, layout: Layout):
        super().__init__()
        self.config = config
        self.dense = RowLinear(in_size, config.hidden_size, layout)  # [H, in/tp]
        self.LayerNorm = layer_norm(config, layout, here=not config.pre_layer_norm)

    def forward(self, x: Tensor, residual: Tensor, seed: tuple | None) -> Tensor:
        projected = self.dense(x)  # [T, in/tp] -> [T, H]
        return self.LayerNorm(dropout(projected, self.config.hidden_dropout_prob, seed) + residual)


class Attention(nn.Module):
    """Self-attention and its output, under Hugging Face's names."""

    def __init__(self, config: ModelConfig, layout: Layout):
        super().__init__()
        self.ln = layer_norm(config, layout, here=config.pre_layer_norm)
        self.self = SelfAttention(config, layout)
        self.output = ResidualOutput(config.hidden_size, config, layout)

    def forward(self, hidden: Tensor, sequences: Sequences, seed: tuple | None) -> Tensor:
        context = self.self(self.ln(hidden), sequences, seed)  # [T, H/tp]
        return self.output(context, hidden, sub_seed(seed, "attention output"))  # [T, H]


class Intermediate(nn.Module):
    """Column-parallel expansion to F and the activation."""

    def __init__(self, config: ModelConfig, layout: Layout):
        super().__init__()
        self.config = config
        self.dense = ColumnLinear(config.hidden_size, config.intermediate_size, layout)  # [F/tp, H]

    def forward(self, hidden: Tensor) -> Tensor:
        return activation(self.dense(hidden), self.config.hidden_act)  # [T, H] -> [T, F/tp]


class Layer(nn.Module):
    """One transformer layer: [T, H] -> [T, H]."""

    def __init__(self, config: ModelConfig, layout: Layout):
        super().__init__()
        self.attention = Attention(config, layout)
        self.ln = layer_norm(config, layout, here=config.pre_layer_norm)
        self.intermediate = Intermediate(config, layout)
        self.output = ResidualOutput(config.intermediate_size, config, layout)

    def forward(self, hidden: Tensor, sequences: Sequences, seed: tuple | None) -> Tensor:
        hidden = self.attention(hidden, sequences, seed)
        return self.output(self.intermediate(self.ln(hidden)), hidden, sub_seed(seed, "output"))


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: ModelConfig, layout: Layout):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, layout) for _ in range(config.num_hidden_layers))
        self.ln = layer_norm(config, layout, here=config.pre_layer_norm)
        self.recompute = False

    def forward(self, hidden: Tensor, sequences: Sequences, seed: tuple | None) -> Tensor:
        for index, layer in enumerate(self.layer):
            hidden = call(layer, hidden, sequences, sub_seed(seed, index), recompute=self.recompute)
        return self.ln(hidden)


class Pooler(nn.Module):
    """tanh of a projection of each sequence's [CLS]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first_tokens: Tensor) -> Tensor:
        return torch.tanh(self.dense(first_tokens))  # [B, H]


class BertModel(nn.Module):
    """Embeddings, encoder, and a pooler if something reads it: without a gradient, weight decay would shrink it."""

    def __init__(self, config: ModelConfig, layout: Layout, add_pooling_layer: bool = True):
        super().__init__()
        config.check_tensor_parallel(layout.tp_size)
        self.config, self.layout = config, layout
        self.embeddings = Embeddings(config, layout)
        self.encoder = Encoder(config, layout)
        self.pooler = Pooler(config) if add_pooling_layer else None

    def forward(self, sequences: Sequences, dropout_seed: tuple | None = None) -> Tensor:
        """Hidden states of the last layer, [T, H]. `dropout_seed` makes the masks; None switches dropout off."""
        if self.layout.sequence_parallel:
            dropout_seed = sub_seed(dropout_seed, self.layout.tp_rank)  # ranks hold different tokens
        hidden = self.embeddings(sequences, dropout_seed)
        hidden = self.encoder(hidden, sequences, dropout_seed)
        return join_tokens(hidden, len(sequences.token_ids), self.layout)

    def pool(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[T, H] -> [B, H]: the pooled [CLS] of each sequence."""
        return self.pooler(hidden[cu_seqlens[:-1].long()])


class PredictionTransform(nn.Module):
    """Dense, activation and LayerNorm before the decoder."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.LayerNorm(activation(self.dense(hidden), self.config.hidden_act))


class Predictions(nn.Module):
    """The masked-language-model head; its decoder is the word embedding, its bias is split like it."""

    def __init__(self, config: ModelConfig, layout: Layout):
        super().__init__()
        self.config, self.layout = config, layout
        self.transform = PredictionTransform(config)
        self.bias = nn.Parameter(torch.zeros(config.padded_vocab_size(layout.tp_size) // layout.tp_size))  # [V/tp]
        mark_split(self.bias, dim=0)

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """[P, H] and [V/tp, H] -> logits [P, V/tp]; what only pads the vocabulary is -inf, out of the softmax."""
        logits = whole_product(self.transform(hidden), word_embeddings, self.bias, self.layout)
        num_real = self.config.vocab_size - self.layout.tp_rank * logits.shape[1]
        if num_real < logits.shape[1]:
            padding = torch.arange(logits.shape[1], device=logits.device) >= num_real
            logits = logits.masked_fill(padding, float("-inf"))
        return logits


class PretrainingHeads(nn.Module):
    """Masked-language-model head and, if there is a pair task, its head."""

    def __init__(self, config: ModelConfig, layout: Layout):
        super().__init__()
        self.predictions = Predictions(config, layout)
        self.seq_relationship = nn.Linear(config.hidden_size, 2) if config.has_pair_head else None


@dataclass
class PretrainingBatch:
    """A micro-batch with its targets. A batch without a pair task has -1 in every pair label."""

    sequences: Sequences
    masked_lm_positions: Tensor  # [P] int64, places in T
    masked_lm_labels: Tensor  # [P] int64
    pair_labels: Tensor  # [B] int64: 1 random next or swapped, 0 in order, -1 none

    def to(self, device: torch.device) -> "PretrainingBatch":
        tensors = (self.masked_lm_positions, self.masked_lm_labels, self.pair_labels)
        return PretrainingBatch(
            self.sequences.to(device), *(tensor.to(device, non_blocking=True) for tensor in tensors)
        )


class PretrainingOutput(NamedTuple):
    """Losses in nats and hits, not reduced. Without a pair label, or without a pair head, a pair loss is 0."""

    mlm_loss: Tensor  # [P] float32
    mlm_correct: Tensor  # [P] bool: the label has the highest logit
    pair_loss: Tensor  # [B] float32
    pair_correct: Tensor  # [B] bool


class BertForPreTraining(nn.Module):
    """BERT with its heads; the MLM head runs on the masked positions alone.

    `recompute` trades time for memory: "selective" computes the attention core again in the backward pass (Korthikanti
    et al. 2022, section 5), "full" whole layers.
    """

    def __init__(self, config: ModelConfig, layout: Layout, recompute: str = "none"):
        super().__init__()
        self.layout = layout
        self.bert = BertModel(config, layout, add_pooling_layer=config.has_pair_head)
        self.cls = PretrainingHeads(config, layout)
        self.bert.encoder.recompute = recompute == "full"
        for layer in self.bert.encoder.layer:
            layer.attention.self.recompute = recompute == "selective"

    def forward(self, batch: PretrainingBatch, dropout_seed: tuple | None = None) -> PretrainingOutput:
        """Losses and hits of a micro-batch. `dropout_seed` makes the dropout masks; None switches dropout off.

        The caller sums and divides: by the counts of the whole step when training, of the whole set when evaluating.
        """
        hidden = self.bert(batch.sequences, dropout_seed)  # [T, H]
        masked = hidden[batch.masked_lm_positions]  # [P, H]
        logits = self.cls.predictions(masked, self.bert.embeddings.word_embeddings.weight).float()  # [P, V/tp]
        mlm_loss, mlm_correct = prediction_loss(logits, batch.masked_lm_labels, self.layout)
        if self.cls.seq_relationship is None:
            nothing = torch.zeros_like(batch.pair_labels)
            return PretrainingOutput(mlm_loss, mlm_correct, nothing.float(), nothing.bool())
        pair_logits = self.cls.seq_relationship(self.bert.pool(hidden, batch.sequences.cu_seqlens)).float()  # [B, 2]
        pair_loss = F.cross_entropy(pair_logits, batch.pair_labels, ignore_index=-1, reduction="none")
        return PretrainingOutput(mlm_loss, mlm_correct, pair_loss, pair_logits.argmax(-1) == batch.pair_labels)


@torch.no_grad()
def init_weights(module: nn.Module, seed: int) -> None:
    """Truncated normal with `initializer_range` (google-research/bert, `create_initializer`), LayerNorm 1, biases 0.

    Each tensor is drawn whole from (seed, name) and then sliced, so every layout starts from the same model, bit for
    bit.
    """
    config, layout = module.bert.config, module.bert.layout
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            generator = torch.Generator().manual_seed(derive_seed(seed, name))
            whole = torch.empty(whole_shape(parameter, name, config, layout))
            std = config.initializer_range
            nn.init.trunc_normal_(whole, std=std, a=-2 * std, b=2 * std, generator=generator)
            parameter.copy_(slice_tensor(whole, parameter, layout))


def whole_shape(parameter: Tensor, name: str, config: ModelConfig, layout: Layout) -> list[int]:
    """Shape of the tensor that `parameter` is a slice of, without the rows that pad the vocabulary."""
    shape = local_shape(parameter)
    if is_split(parameter):
        shape[parameter.partition_dim] *= layout.tp_size
    if name.endswith(("word_embeddings.weight", "predictions.bias")):
        shape[0] = config.vocab_size
    return shape


def slice_tensor(whole: Tensor, parameter: Tensor, layout: Layout) -> Tensor:
    """This rank's slice of a whole tensor, the vocabulary padded with zero rows."""
    if not is_split(parameter):
        return whole
    dim, size = parameter.partition_dim, local_shape(parameter)[parameter.partition_dim]
    missing = size * layout.tp_size - whole.shape[dim]
    if missing:
        whole = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])
    return whole.narrow(dim, layout.tp_rank * size, size)


@torch.no_grad()
def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], optional: tuple[str, ...] = ()) -> list[str]:
    """Fills a module from whole tensors by name, sliced for this rank; ValueError names what is missing, left over or
    of another shape.

    Parameters whose names begin with one of `optional` may be missing: they stay as they are, and are returned.
    """
    config, layout = module.bert.config, module.bert.layout
    parameters = dict(module.named_parameters())
    constants = {name for name, _ in module.named_buffers()}  # sinusoidal positions: a file may hold them
    absent = [name for name in parameters if name not in tensors]
    missing = [name for name in absent if not name.startswith(optional)]
    extra = sorted(tensors.keys() - parameters.keys() - constants)
    if missing or extra:
        raise ValueError(f"the checkpoint does not fit the model: missing {missing[:5]}, left over {extra[:5]}")
    for name in parameters.keys() - absent:
        parameter, tensor = parameters[name], tensors[name]
        expected = whole_shape(parameter, name, config, layout)
        if list(tensor.shape) != expected:
            raise ValueError(
                f"the checkpoint does not fit the model: {name} is {list(tensor.shape)}, expected {expected}"
            )
        parameter.copy_(slice_tensor(tensor, parameter, layout))
    return absent
