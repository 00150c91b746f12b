"""What is trained and how: the model's shape and the DeepSpeed file, both checked before any rank starts to train.

The model is a preset name or a Hugging Face `config.json`; how it is run (batch, precision, ZeRO, optimizer, schedule)
is one DeepSpeed JSON. Nothing here edits what the user wrote: a wrong value raises a ValueError that names it, the rule
and the way out.
"""

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path

from pretrain.schedule import COMMON_KEYS, SCHEDULES, check_schedule

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


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a BERT, by the names of Hugging Face's `BertConfig` (Devlin et al. 2019, section 3).

    `model_type` says where LayerNorm stands, as it does for Hugging Face: after each residual sum in "bert", before
    each block and after the last in "megatron-bert" (Shoeybi et al. 2019, section 5.3). Two fields are ours: positions
    are learned ("absolute") or "sinusoidal" (Vaswani et al. 2017, 3.5), and `pair_task` says what the pair head
    predicts; the data decides it, and with "none" there is neither pooler nor pair head.
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
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"model config: {field.name}={value!r} is not a positive whole number")
            if field.name.endswith("_prob") and not 0 <= value < 1:
                raise ValueError(f"model config: {field.name}={value!r} is not a probability in [0, 1)")
        if self.hidden_size % self.num_attention_heads:
            fitting = [n for n in range(1, self.num_attention_heads * 2) if self.hidden_size % n == 0]
            raise ValueError(
                f"model config: hidden_size={self.hidden_size} cannot be split over num_attention_heads="
                f"{self.num_attention_heads}; choose one of {fitting} heads"
            )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"model config: {name}={getattr(self, name)!r} is unknown; choose one of {choices}")
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
        """With this dropout of hidden states and attention; None leaves it as it is."""
        if share is None:
            return self
        return dataclasses.replace(self, hidden_dropout_prob=share, attention_probs_dropout_prob=share)

    def check_tensor_parallel(self, tp_size: int) -> None:
        """Raises ValueError unless heads and feed-forward columns can be split evenly over `tp_size` ranks."""
        for name in ("num_attention_heads", "intermediate_size"):
            size = getattr(self, name)
            if size % tp_size:
                fitting = [n for n in range(1, self.num_attention_heads + 1) if self.num_attention_heads % n == 0]
                raise ValueError(
                    f"{name}={size} cannot be split over --tensor-parallel {tp_size}; choose from {fitting}"
                )

    def padded_vocab_size(self, tp_size: int) -> int:
        """The vocabulary rounded up to a multiple of 128 x tp (Shoeybi et al. 2019, section 3): even slices, fast
        products.
        """
        multiple = 128 * tp_size
        return -(-self.vocab_size // multiple) * multiple

    def training_flops(self, lengths, num_predictions: int) -> float:
        """Floating-point operations of forward and backward (three times forward) over sequences of real `lengths`.

        Counts the matrix products only: projections and feed-forward, attention's two products, pooler, MLM head.
        """
        hidden, layers = self.hidden_size, self.num_hidden_layers
        tokens = float(sum(int(length) for length in lengths))
        pairs = float(sum(int(length) ** 2 for length in lengths))
        encoder = layers * (2 * tokens * (4 * hidden**2 + 2 * hidden * self.intermediate_size) + 4 * pairs * hidden)
        heads = num_predictions * 2 * hidden * (hidden + self.vocab_size)
        pooler = len(lengths) * 2 * hidden**2 if self.has_pair_head else 0
        return 3 * (encoder + heads + pooler)

    def to_json(self) -> dict:
        """Hugging Face's config.json, of `BertForPreTraining` or its like."""
        family = "MegatronBert" if self.pre_layer_norm else "Bert"
        heads = "ForPreTraining" if self.has_pair_head else "ForMaskedLM"
        return {"architectures": [family + heads], **dataclasses.asdict(self)}


def load_model_config(name_or_file: str | Path, vocab_size: int | None = None) -> ModelConfig:
    """A preset by name, or a Hugging Face `config.json`.

    A preset takes its vocabulary from the data (`vocab_size`); a file states its own, which must not be smaller than
    the data's.
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
    values = read_json(path)
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    required = {field.name for field in dataclasses.fields(ModelConfig) if field.default is dataclasses.MISSING}
    missing = sorted(required - values.keys())
    if missing:
        raise ValueError(f"{path}: missing {', '.join(missing)}; a Hugging Face BERT config.json has them")
    config = ModelConfig(**{key: value for key, value in values.items() if key in known})
    if vocab_size is not None and config.vocab_size < vocab_size:
        raise ValueError(
            f"{path}: vocab_size={config.vocab_size} is less than the vocabulary's {vocab_size}; it must hold every id"
        )
    return config


def read_json(path: str | Path) -> dict:
    """A JSON object from a file; ValueError names the file and the place of the mistake."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def nearest(name: str, known) -> str:
    """'; did you mean X?' when something known is spelt like `name`, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


OPTIMIZER_DEFAULTS = {
    "Lamb": {
        "lr": None,
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "weight_decay": 0.01,
        "bias_correction": True,
        "use_nvlamb": False,
        "min_trust_ratio": 0.0,
        "max_trust_ratio": None,
    },
    "AdamW": {"lr": None, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
}
REQUIRED_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "optimizer", "scheduler")
DEEPSPEED_KEYS = (
    *REQUIRED_KEYS,
    *(
        "gradient_clipping",
        "zero_optimization",
        "bf16",
        "fp16",
        "data_types",
        "steps_per_print",
        "wall_clock_breakdown",
    ),
    *(
        "prescale_gradients",
        "communication_data_type",
        "comms_logger",
        "flops_profiler",
        "dump_state",
        "memory_breakdown",
    ),
    *("gradient_accumulation_steps", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "aio"),
)


def load_deepspeed_config(path: str | Path, overrides: list[str] = ()) -> dict:
    """The DeepSpeed JSON of one phase, with `a.b=value` overrides from the command line, checked.

    Raises ValueError for a missing key, a misspelt one (and names the nearest), a value of the wrong kind, or a batch
    that does not add up.
    """
    config = read_json(path)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"--set {override}: expected KEY=VALUE, as in --set optimizer.params.lr=0.004")
        target = config
        *parents, last = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"--set {override}: {parent} is a value in {path}, it has no {last}")
        target[last] = parse_value(value)
    check_deepspeed_config(config, str(path))
    return config


def parse_value(text: str):
    """A JSON value from the command line; what is not JSON is a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def check_deepspeed_config(config: dict, path: str) -> None:
    """Raises ValueError for what DeepSpeed would accept silently or refuse late."""
    check_keys(config, DEEPSPEED_KEYS, path)
    for key in REQUIRED_KEYS:
        if key not in config:
            raise ValueError(f"{path}: {key!r} is missing; see ds_configs/README.md for a complete file")
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        if type(config[key]) is not int or config[key] < 1:
            raise ValueError(f"{path}: {key}={config[key]!r} is not a positive whole number")
    kind, params = named_block(config, "optimizer", OPTIMIZER_DEFAULTS, path)
    check_keys(params, OPTIMIZER_DEFAULTS[kind], f"{path}: optimizer.params")
    check_optimizer({**OPTIMIZER_DEFAULTS[kind], **params}, f"{path}: optimizer.params")
    kind, params = named_block(config, "scheduler", SCHEDULES, path)
    check_keys(params, (*COMMON_KEYS, *SCHEDULES[kind]), f"{path}: scheduler.params")
    check_schedule(kind, params, f"{path}: scheduler.params")
    check_zero_stage(config, path)


def check_zero_stage(config: dict, path: str) -> None:
    """Raises ValueError for a stage that ZeRO has not, and for one that is wrong with 16 bits."""
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage={stage!r}; ZeRO has the stages 0, 1, 2 and 3")
    if stage == 0 and any(config.get(kind, {}).get("enabled") for kind in ("bf16", "fp16")):
        raise ValueError(
            f"{path}: 16 bits at zero_optimization.stage=0: DeepSpeed's wrapper for that takes a first step before the"
            " optimizer knows its tensors; choose stage 1, which on one device is the same work"
        )


def check_optimizer(params: dict, where: str) -> None:
    """Raises ValueError for the first value that LAMB or AdamW would take and go wrong with."""
    betas, lowest, highest = params["betas"], params.get("min_trust_ratio"), params.get("max_trust_ratio")
    are_betas = isinstance(betas, list | tuple) and len(betas) == 2
    rules = {
        "lr": (is_number(params["lr"]) and params["lr"] >= 0, "a learning rate: a number such as 0.004"),
        "betas": (are_betas and all(is_number(beta) and 0 <= beta < 1 for beta in betas), "two numbers from 0 to 1"),
        "eps": (is_number(params["eps"]) and params["eps"] > 0, "a small number such as 1e-6"),
        "weight_decay": (is_number(params["weight_decay"]) and params["weight_decay"] >= 0, "0 or a number above it"),
        "min_trust_ratio": (lowest is None or (is_number(lowest) and lowest >= 0), "0 or a number above it"),
        "max_trust_ratio": (
            highest is None or (is_number(highest) and highest > (lowest or 0)),
            "a number above min_trust_ratio, or null",
        ),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"{where}.{name}={params[name]!r} must be {rule}")


def named_block(config: dict, name: str, known, path: str) -> tuple[str, dict]:
    """The type and the params of an `optimizer` or `scheduler` block."""
    block = config[name]
    if not isinstance(block, dict) or not isinstance(block.get("params"), dict):
        raise ValueError(f'{path}: {name} must be {{"type": ..., "params": {{...}}}}')
    check_keys(block, ("type", "params"), f"{path}: {name}")
    if block.get("type") not in known:
        kind, kinds = block.get("type"), ", ".join(known)
        raise ValueError(f"{path}: {name}.type={kind!r} is unknown; choose {kinds}{nearest(str(kind), known)}")
    return block["type"], block["params"]


def check_keys(values: dict, known, where: str) -> None:
    """Raises ValueError for the first key that is not known, naming the nearest."""
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(key, known)}")


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def num_accumulation_steps(config: dict, dp_size: int) -> int:
    """Micro-batches a rank runs in one step; ValueError if the batch does not divide by the ranks."""
    batch, micro_batch = config["train_batch_size"], config["train_micro_batch_size_per_gpu"]
    steps, rest = divmod(batch, micro_batch * dp_size)
    if rest or steps == 0:
        raise ValueError(
            f"train_batch_size={batch} is not a multiple of train_micro_batch_size_per_gpu={micro_batch} x {dp_size}"
            f" data-parallel ranks; choose a multiple of {micro_batch * dp_size}, or another micro-batch with"
            " --set train_micro_batch_size_per_gpu=N"
        )
    stated = config.get("gradient_accumulation_steps", steps)
    if stated != steps:
        raise ValueError(
            f"gradient_accumulation_steps={stated}, but {batch} / ({micro_batch} x {dp_size}) = {steps}; leave it out"
        )
    return steps


def engine_config(config: dict) -> dict:
    """What DeepSpeed is given: the file without the optimizer and the schedule, which are built here, and with the keys
    that this needs.
    """
    derived = {key: value for key, value in config.items() if key not in ("optimizer", "scheduler")}
    return {
        "steps_per_print": 10**9,
        **derived,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
