"""BERT with its masked-language-model and pair heads (Devlin et al. 2019), split over tensor-parallel ranks as Megatron
splits a transformer (Shoeybi et al. 2019, section 3). At tp 1 the same code is an ordinary BERT.

Read this file from the bottom up: `BertForPreTraining.forward` computes the losses; what it calls is defined above it.

Shape legend for the whole package: B batch, S sequence, P predicted positions, T tokens of an unpadded batch, H hidden,
N heads, D head, F feed-forward, V vocabulary; `/tp` marks a dimension split over the tensor-parallel ranks. Under
sequence parallelism, activations written [T, H] between tensor-parallel products are [T/tp, H].

Parameters are named as in Hugging Face's `BertForPreTraining`, with pre-LayerNorm as in `MegatronBertForPreTraining`,
so a conversion only merges slices. Query, key and value are separate parameters so that each has its own trust ratio in
LAMB. The forward pass concatenates them for one product and one all-reduce of the input's gradient.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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
    joined_linear,
    linear,
    local_shape,
    mark_split,
    prediction_loss,
    split_tokens,
    sub_seed,
)
from pretrain.layout import Layout
from pretrain.model_config import ModelConfig
from pretrain.parameter_table import is_vocabulary
from pretrain.positions import sinusoidal_positions


@torch.no_grad()
def init_weights(module: nn.Module, seed: int) -> None:
    """Truncated normal with `initializer_range` (google-research/bert, `create_initializer`), LayerNorm 1, biases 0.

    Each tensor is drawn whole from (seed, name) and then sliced, so every layout starts from bit-identical weights.
    """
    config, layout = module.bert.config, module.bert.layout
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif len(local_shape(parameter)) == 1:
            parameter.fill_(1.0)
        else:
            generator = torch.Generator().manual_seed(derive_seed(seed, name))
            whole = torch.empty(whole_shape(parameter, name, config, layout))
            std = config.initializer_range
            nn.init.trunc_normal_(whole, std=std, a=-2 * std, b=2 * std, generator=generator)
            parameter.copy_(slice_tensor(whole, parameter, layout))


@torch.no_grad()
def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], optional: tuple[str, ...] = ()) -> list[str]:
    """Fill a module from whole tensors by name, sliced for this rank.

    Parameters with a prefix in `optional` may be missing: they stay unchanged, and their names are returned. Raises
    ValueError, by name, for tensors that are missing, superfluous or of another shape.
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


def whole_shape(parameter: Tensor, name: str, config: ModelConfig, layout: Layout) -> list[int]:
    """The shape of the whole tensor that `parameter` is a slice of, without vocabulary padding."""
    shape = local_shape(parameter)
    if is_split(parameter):
        shape[parameter.partition_dim] *= layout.tp_size
    if is_vocabulary(name):
        shape[0] = config.vocab_size
    return shape


def slice_tensor(whole: Tensor, parameter: Tensor, layout: Layout) -> Tensor:
    """This rank's slice of a whole tensor, with the vocabulary padded by zeros."""
    if not is_split(parameter):
        return whole
    dim, size = parameter.partition_dim, local_shape(parameter)[parameter.partition_dim]
    missing = size * layout.tp_size - whole.shape[dim]
    if missing:
        whole = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])
    return whole.narrow(dim, layout.tp_rank * size, size)


def activation(name: str) -> nn.Module:
    """GELU, exact or approximated by tanh (Hendrycks and Gimpel 2016), or ReLU."""
    return nn.ReLU() if name == "relu" else nn.GELU(approximate="tanh" if name == "gelu_new" else "none")


def in_order(**modules: nn.Module) -> nn.Sequential:
    """A sequence of named modules; their names become part of the parameters' names."""
    return nn.Sequential(OrderedDict(modules))


def recomputed(function: Callable) -> Callable:
    """The function with activation checkpointing (Chen et al. 2016): the backward pass recomputes what it needs.

    Dropout seeds itself, so no generator state is saved and the gradients stay the same bit for bit.
    """
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


def layer_norm(config: ModelConfig, layout: Layout, here: bool) -> nn.Module:
    """LayerNorm if this kind of BERT has one `here`, otherwise the identity."""
    return LayerNorm(config.hidden_size, config.layer_norm_eps, layout) if here else nn.Identity()


class SinusoidalPositions(nn.Module):
    """Constant sinusoidal positions, with the interface of learned ones."""

    def __init__(self, num_positions: int, hidden_size: int):
        super().__init__()
        self.register_buffer("weight", sinusoidal_positions(num_positions, hidden_size), persistent=False)

    def forward(self, position_ids: Tensor) -> Tensor:
        return self.weight[position_ids]


class Embeddings(nn.Module):
    """The sum of word, position and segment embeddings, LayerNorm and dropout: [T] -> [T, H]."""

    def __init__(self, config: ModelConfig, layout: Layout):
        super().__init__()
        self.config, self.layout = config, layout
        vocab_size, hidden_size = config.padded_vocab_size(layout.tp_size), config.hidden_size
        positions = SinusoidalPositions if config.position_embedding_type == "sinusoidal" else nn.Embedding
        self.word_embeddings = embedding(vocab_size, hidden_size, layout)  # [V/tp, H]
        self.position_embeddings = positions(config.max_position_embeddings, hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden_size)
        self.LayerNorm = layer_norm(config, layout, here=not config.pre_layer_norm)

    def forward(self, sequences: Sequences, seed: tuple | None) -> Tensor:
        words = self.word_embeddings(sequences.token_ids)
        # DeepSpeed casts only parameters, so sinusoidal positions stay float32.
        positions = self.position_embeddings(sequences.position_ids).type_as(words)
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
        qkv = joined_linear(hidden, (self.query, self.key, self.value))  # [T, 3 * H/tp]
        num_heads = self.config.num_attention_heads // self.layout.tp_size
        seed = sub_seed(seed, "attention", self.layout.tp_rank)
        attend = recomputed(self_attention) if self.recompute else self_attention
        return attend(qkv, num_heads, sequences, self.config.attention_probs_dropout_prob, seed)  # [T, H/tp]


class ResidualOutput(nn.Module):
    """Row-parallel projection back to H, dropout, residual sum and, in post-LayerNorm models, LayerNorm."""

    def __init__(self, in_size: int, config: ModelConfig, layout: Layout):
        super().__init__()
        self.config = config
        self.dense = RowLinear(in_size, config.hidden_size, layout)  # [H, in/tp]
        self.LayerNorm = layer_norm(config, layout, here=not config.pre_layer_norm)

    def forward(self, x: Tensor, residual: Tensor, seed: tuple | None) -> Tensor:
        projected = self.dense(x)  # [T, in/tp] -> [T, H]
        return self.LayerNorm(dropout(projected, self.config.hidden_dropout_prob, seed) + residual)


class Attention(nn.Module):
    """Self-attention and its output projection, under Hugging Face's names."""

    def __init__(self, config: ModelConfig, layout: Layout):
        super().__init__()
        self.ln = layer_norm(config, layout, here=config.pre_layer_norm)
        self.self = SelfAttention(config, layout)
        self.output = ResidualOutput(config.hidden_size, config, layout)

    def forward(self, hidden: Tensor, sequences: Sequences, seed: tuple | None) -> Tensor:
        context = self.self(self.ln(hidden), sequences, seed)  # [T, H/tp]
        return self.output(context, hidden, sub_seed(seed, "attention output"))  # [T, H]


class Layer(nn.Module):
    """One transformer layer, attention and feed-forward: [T, H] -> [T, H]."""

    def __init__(self, config: ModelConfig, layout: Layout):
        super().__init__()
        self.attention = Attention(config, layout)
        self.ln = layer_norm(config, layout, here=config.pre_layer_norm)
        self.intermediate = in_order(
            dense=ColumnLinear(config.hidden_size, config.intermediate_size, layout),  # [F/tp, H]
            activation=activation(config.hidden_act),
        )
        self.output = ResidualOutput(config.intermediate_size, config, layout)

    def forward(self, hidden: Tensor, sequences: Sequences, seed: tuple | None) -> Tensor:
        hidden = self.attention(hidden, sequences, seed)
        expanded = self.intermediate(self.ln(hidden))  # [T, H] -> [T, F/tp]
        return self.output(expanded, hidden, sub_seed(seed, "output"))


class Encoder(nn.Module):
    """The stack of layers and, in pre-LayerNorm models, a last LayerNorm."""

    def __init__(self, config: ModelConfig, layout: Layout):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, layout) for _ in range(config.num_hidden_layers))
        self.ln = layer_norm(config, layout, here=config.pre_layer_norm)
        self.recompute = False

    def forward(self, hidden: Tensor, sequences: Sequences, seed: tuple | None) -> Tensor:
        for index, layer in enumerate(self.layer):
            run = recomputed(layer) if self.recompute else layer
            hidden = run(hidden, sequences, sub_seed(seed, index))
        return self.ln(hidden)


class BertModel(nn.Module):
    """Embeddings, encoder and an optional pooler. Weight decay would shrink an unused pooler, which has no gradient."""

    def __init__(self, config: ModelConfig, layout: Layout, add_pooling_layer: bool = True):
        super().__init__()
        config.check_tensor_parallel(layout.tp_size)
        self.config, self.layout = config, layout
        self.embeddings = Embeddings(config, layout)
        self.encoder = Encoder(config, layout)
        if add_pooling_layer:
            self.pooler = in_order(dense=nn.Linear(config.hidden_size, config.hidden_size), activation=nn.Tanh())

    def forward(self, sequences: Sequences, dropout_seed: tuple | None = None) -> Tensor:
        """Hidden states of the last layer, [T, H]. `dropout_seed` determines the masks; None switches dropout off."""
        if self.layout.sequence_parallel:
            dropout_seed = sub_seed(dropout_seed, self.layout.tp_rank)  # ranks hold different tokens
        hidden = self.embeddings(sequences, dropout_seed)
        hidden = self.encoder(hidden, sequences, dropout_seed)
        return join_tokens(hidden, len(sequences.token_ids), self.layout)

    def pool(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[T, H] -> [B, H]: tanh of a projection of each sequence's first token, [CLS]."""
        return self.pooler(hidden[cu_seqlens[:-1].long()])


class Predictions(nn.Module):
    """The masked-language-model head. Its decoder is the word embedding, and its bias is split like it."""

    def __init__(self, config: ModelConfig, layout: Layout):
        super().__init__()
        self.config, self.layout = config, layout
        self.transform = in_order(
            dense=nn.Linear(config.hidden_size, config.hidden_size),
            activation=activation(config.hidden_act),
            LayerNorm=nn.LayerNorm(config.hidden_size, config.layer_norm_eps),
        )
        self.bias = nn.Parameter(torch.zeros(config.padded_vocab_size(layout.tp_size) // layout.tp_size))  # [V/tp]
        mark_split(self.bias, dim=0)

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """[P, H] and [V/tp, H] -> logits [P, V/tp]. Rows that pad the vocabulary get -inf, so softmax ignores them."""
        logits = linear(self.transform(hidden), word_embeddings, self.bias, self.layout)
        num_real = self.config.vocab_size - self.layout.tp_rank * logits.shape[1]
        if num_real < logits.shape[1]:
            padding = torch.arange(logits.shape[1], device=logits.device) >= num_real
            logits = logits.masked_fill(padding, float("-inf"))
        return logits


@dataclass
class PretrainingBatch:
    """A micro-batch with its targets."""

    sequences: Sequences
    masked_lm_rows: Tensor  # [P] int64, the predicted tokens' rows in [T, H]
    masked_lm_labels: Tensor  # [P] int64
    pair_labels: Tensor  # [B] int64: 1 random next or swapped, 0 in order, -1 no pair task

    def to(self, device: torch.device) -> "PretrainingBatch":
        return PretrainingBatch(
            self.sequences.to(device),
            self.masked_lm_rows.to(device, non_blocking=True),
            self.masked_lm_labels.to(device, non_blocking=True),
            self.pair_labels.to(device, non_blocking=True),
        )


class PretrainingOutput(NamedTuple):
    """Unreduced losses in nats, and correctness. The pair loss is 0 without a pair label or a pair head."""

    mlm_loss: Tensor  # [P] float32
    mlm_correct: Tensor  # [P] bool: the label has the highest logit
    pair_loss: Tensor  # [B] float32
    pair_correct: Tensor  # [B] bool


class BertForPreTraining(nn.Module):
    """BERT with its pretraining heads; the MLM head runs on the masked positions only.

    `recompute` saves memory: the backward pass recomputes the attention core ("selective", Korthikanti et al. 2022,
    section 5) or whole layers ("full").
    """

    def __init__(self, config: ModelConfig, layout: Layout, recompute: str = "none"):
        super().__init__()
        self.layout, self.has_pair_head = layout, config.has_pair_head
        self.bert = BertModel(config, layout, add_pooling_layer=config.has_pair_head)
        self.cls = nn.ModuleDict({"predictions": Predictions(config, layout)})
        if config.has_pair_head:
            self.cls["seq_relationship"] = nn.Linear(config.hidden_size, 2)
        self.bert.encoder.recompute = recompute == "full"
        for layer in self.bert.encoder.layer:
            layer.attention.self.recompute = recompute == "selective"

    def forward(self, batch: PretrainingBatch, dropout_seed: tuple | None = None) -> PretrainingOutput:
        """Losses and correct predictions of a micro-batch. `dropout_seed` sets the masks; None switches dropout off.

        The caller sums the losses and divides them by the counts of the whole training step or evaluation set. The loss
        that is trained on is computed by `accumulate_gradients` in pretrain/train.py.
        """
        hidden = self.bert(batch.sequences, dropout_seed)  # [T, H]
        masked = hidden[batch.masked_lm_rows]  # [P, H]
        logits = self.cls.predictions(masked, self.bert.embeddings.word_embeddings.weight).float()  # [P, V/tp]
        mlm_loss, mlm_correct = prediction_loss(logits, batch.masked_lm_labels, self.layout)
        if not self.has_pair_head:
            zeros = torch.zeros_like(batch.pair_labels)
            return PretrainingOutput(mlm_loss, mlm_correct, zeros.float(), zeros.bool())
        pair_logits = self.cls.seq_relationship(self.bert.pool(hidden, batch.sequences.cu_seqlens)).float()  # [B, 2]
        pair_loss = F.cross_entropy(pair_logits, batch.pair_labels, ignore_index=-1, reduction="none")
        return PretrainingOutput(mlm_loss, mlm_correct, pair_loss, pair_logits.argmax(-1) == batch.pair_labels)
