"""The model's shape: a preset's name or a Hugging Face `config.json`, checked before training starts.

Training settings are in deepspeed_config.py. A wrong value raises a ValueError that names it, the rule and the fix.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.files import read_json
from pretrain.json_values import check_number, nearest

# layers, hidden size, heads (Devlin et al. 2019, section 3; Turc et al. 2019, table 1; Shoeybi et al. 2019, table 4)
PRESETS = {
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "medium": (8, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
    "1.3b": (24, 2048, 32),
    "3.9b": (48, 2560, 40),
}
PRE_LAYER_NORM_PRESETS = ("1.3b", "3.9b")  # beyond BERT-large, post-LayerNorm is unstable (Shoeybi et al., section 5.3)
CHOICES = {
    "hidden_act": ("gelu", "gelu_new", "relu"),
    "model_type": ("bert", "megatron-bert"),
    "position_embedding_type": ("absolute", "sinusoidal"),
    "pair_task": ("nsp", "sop", "none"),
}
RECOMPUTE = ("none", "selective", "full")  # in the backward pass, see model.BertForPreTraining


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a BERT, with the field names of Hugging Face's `BertConfig` (Devlin et al. 2019, section 3).

    `model_type` places LayerNorm: "bert" after each residual sum, "megatron-bert" before each block and after the last
    (Shoeybi et al. 2019, section 5.3). `position_embedding_type` may also be "sinusoidal" (Vaswani et al. 2017, section
    3.5). `pair_task` is ours: what the pair head predicts, as the data decides; "none" removes pooler and pair head.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    model_type: str = "bert"
    position_embedding_type: str = "absolute"
    pair_task: str = "nsp"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), f"model config: {field.name}"
            if field.type is int:
                check_number(value, name, low=1, whole=True)
            elif field.name.endswith("_prob"):
                check_number(value, name, high=1, exclude=1)
            elif field.type is float:
                check_number(value, name)
            elif field.name in CHOICES and value not in CHOICES[field.name]:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {CHOICES[field.name]}")
        if self.hidden_size % self.num_attention_heads:
            fitting = [n for n in range(1, self.num_attention_heads * 2) if self.hidden_size % n == 0]
            raise ValueError(
                f"model config: hidden_size={self.hidden_size} cannot be split over num_attention_heads="
                f"{self.num_attention_heads}; choose one of {fitting} heads"
            )
        if self.position_embedding_type == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(
                f"model config: hidden_size={self.hidden_size} is odd; sinusoidal positions are pairs of sine and"
                " cosine: choose an even size or position_embedding_type='absolute'"
            )

    @property
    def pre_layer_norm(self) -> bool:
        return self.model_type == "megatron-bert"

    @property
    def has_pair_head(self) -> bool:
        return self.pair_task != "none"

    def with_dropout(self, share: float | None) -> "ModelConfig":
        """The same model with one dropout for hidden states and attention; unchanged for None."""
        if share is None:
            return self
        return dataclasses.replace(self, hidden_dropout_prob=share, attention_probs_dropout_prob=share)

    def check_tensor_parallel(self, tp_size: int) -> None:
        """Raise ValueError unless heads and feed-forward columns can be split evenly over `tp_size` ranks."""
        for name in ("num_attention_heads", "intermediate_size"):
            size = getattr(self, name)
            if size % tp_size:
                fitting = [n for n in range(1, self.num_attention_heads + 1) if self.num_attention_heads % n == 0]
                raise ValueError(
                    f"{name}={size} cannot be split over --tensor-parallel {tp_size}; choose from {fitting}"
                )

    def padded_vocab_size(self, tp_size: int) -> int:
        """`vocab_size` padded to a multiple of 128 x tp for equal slices and speed (Shoeybi et al. 2019, section 3)."""
        multiple = 128 * tp_size
        return -(-self.vocab_size // multiple) * multiple

    def training_flops(self, lengths: Sequence[int], num_predictions: int) -> float:
        """Floating-point operations of forward and backward (three times forward) over sequences of real `lengths`.

        Counts only matrix products: projections, feed-forward, attention's two products, pooler and MLM head.
        """
        hidden, layers = self.hidden_size, self.num_hidden_layers
        tokens = float(sum(int(length) for length in lengths))
        pairs = float(sum(int(length) ** 2 for length in lengths))
        encoder = layers * (2 * tokens * (4 * hidden**2 + 2 * hidden * self.intermediate_size) + 4 * pairs * hidden)
        heads = num_predictions * 2 * hidden * (hidden + self.vocab_size)
        pooler = len(lengths) * 2 * hidden**2 if self.has_pair_head else 0
        return 3 * (encoder + heads + pooler)

    def to_json(self) -> dict:
        """The content of Hugging Face's config.json, including the class that loads the model."""
        family = "MegatronBert" if self.pre_layer_norm else "Bert"
        heads = "ForPreTraining" if self.has_pair_head else "ForMaskedLM"
        return {"architectures": [family + heads], **dataclasses.asdict(self)}


def load_model_config(name_or_file: str | Path, vocab_size: int | None = None) -> ModelConfig:
    """The model of a preset or of a Hugging Face `config.json`.

    A preset takes `vocab_size` from the data. A file states its own, which must not be smaller than the data's. Raises
    ValueError for an unknown name and for a file with a missing or wrong value.
    """
    name = str(name_or_file)
    if name in PRESETS:
        if vocab_size is None:
            raise ValueError(f"model preset {name!r} needs a vocabulary: its size is not part of the preset")
        layers, hidden, heads = PRESETS[name]
        model_type = "megatron-bert" if name in PRE_LAYER_NORM_PRESETS else "bert"
        return ModelConfig(vocab_size, hidden, layers, heads, 4 * hidden, model_type=model_type)
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"--model {name}: neither a preset ({', '.join(PRESETS)}) nor a config.json file{nearest(name, PRESETS)}"
        )
    values = read_json(path, dict)
    fields = dataclasses.fields(ModelConfig)
    missing = [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in values]
    if missing:
        raise ValueError(f"{path}: missing {', '.join(missing)}; a Hugging Face BERT config.json has them")
    config = ModelConfig(**{field.name: values[field.name] for field in fields if field.name in values})
    if vocab_size is not None and config.vocab_size < vocab_size:
        raise ValueError(
            f"{path}: vocab_size={config.vocab_size} is less than the vocabulary's {vocab_size}; it must hold every id"
        )
    return config
