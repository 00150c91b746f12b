"""The options that fine-tuning and a grid of fine-tunings share, the checks between them, and what they resolve to."""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_prep.cli import CaseOptions, at_least, number, option, share
from data_prep.files import sha256_file
from evaluation.baselines import BASELINES
from evaluation.start import Start
from evaluation.tasks.by_name import TASK_HELP
from evaluation.tasks.conll import SCHEMES
from evaluation.tasks.rows import text_files
from evaluation.tasks.task import Task
from pretrain.deepspeed_config import REQUIRED_KEYS, check_engine_settings, precision_of, read_with_overrides
from pretrain.layout import check_device_precision

CHECKPOINT_HELP = (
    "a pretraining run, one of its checkpoints, or a Hugging Face folder; 'random' for the same model without "
    "pretraining; 'majority' or 'ngram' for a baseline without a network"
)
MAX_GRAD_NORM = 1.0
COPIED_SETTINGS = ("epochs", "patience", "batch_size", "rescale_embeddings", "keep_weights")  # to run.json, unchanged
# Keys that a DeepSpeed file may not have here, since flags set them.
KEYS_OF_FLAGS = (*REQUIRED_KEYS, "gradient_accumulation_steps", "gradient_clipping")

optional = partial(option, default=None)
training = partial(option, group="training")
distillation = partial(optional, group="distillation")
of_a_task = partial(optional, group="SQuAD and named entities")


@dataclass(frozen=True, kw_only=True)
class SharedOptions(CaseOptions):
    """All options of a fine-tuning except learning rate, batch size and epochs, which a grid varies."""

    task: str = option(TASK_HELP, metavar="NAME")
    checkpoint: str = option(CHECKPOINT_HELP, metavar="WHERE")
    data_dir: Path = option("folder of the task's files", metavar="DIR")
    output: Path = option("folder to write; missing, empty, or begun by the same command", metavar="DIR")
    train_file: str | None = optional("file in DATA-DIR, if not the task's usual one", metavar="NAME")
    dev_file: str | None = optional("file in DATA-DIR, if not the task's usual one", metavar="NAME")
    max_train_examples: int | None = optional(
        "train on N examples, the same for every seed, drawn at random in proportion to their labels", type=at_least(1)
    )
    model: str | None = optional("preset or config.json, for --checkpoint random", metavar="NAME")
    vocab: Path | None = optional("vocabulary, for --checkpoint random and for folders without one")
    cache: Path | None = optional("folder of tokenised examples that any number of runs may share", metavar="DIR")
    seeds: tuple[int, ...] = training("trained one after the other", default=(0, 1, 2), type=at_least(0), metavar="N")
    patience: int | None = training(
        "stop a seed after N epochs without a better dev score", default=None, type=at_least(1)
    )
    micro_batch_size: int | None = training(
        "examples that a rank computes at once (default: its whole share of a step)", default=None, type=at_least(1)
    )
    warmup_proportion: float = training(
        "share of the steps during which the learning rate rises", default=0.1, type=share
    )
    weight_decay: float = training(
        "of AdamW; biases and LayerNorm have none", default=0.01, type=number(low=0, below=1)
    )
    rescale_embeddings: bool = training(
        "scale the embeddings to the size of freshly initialized ones, which does not change the output; it helps "
        "AdamW if the checkpoint's weights have grown under large LAMB steps",
        default=False,
    )
    dropout: float | None = training("of hidden states and attention (default: the checkpoint's)", default=None)
    seq_length: int | None = training(
        "tokens per sequence; longer sentences are cut, documents are read in windows (default: 128; SQuAD 384)",
        default=None,
        type=at_least(5),
    )
    keep_weights: str = training(
        "epoch of each seed whose weights are kept as a Hugging Face folder, SEED/model",
        default="last",
        choices=("last", "best", "none"),
    )
    deepspeed_config: Path | None = training(
        "DeepSpeed JSON with precision and ZeRO only",
        default=None,
        flags=("--deepspeed-config", "--deepspeed_config"),
    )
    overrides: tuple[str, ...] = training(
        "overrides of that file, applied in order: zero_optimization.stage=1",
        default=(),
        flags=("--set",),
        metavar="KEY=VALUE",
    )
    teacher: Path | None = distillation(
        "a finished run of the same task and vocabulary, whose answers to the training examples are learned in "
        "addition to their labels",
        metavar="RUN",
    )
    distill_weight: float | None = distillation(
        "the teacher's share of the loss (default: 0.5)", type=number(above=0, high=1)
    )
    temperature: float | None = distillation("softens the teacher's answers (default: 2)", type=number(above=0))
    doc_stride: int | None = of_a_task("SQuAD: tokens from window to window (default: 128)", type=at_least(1))
    max_query_length: int | None = of_a_task("SQuAD: tokens of a question (default: 64)", type=at_least(1))
    max_answer_length: int | None = of_a_task("SQuAD: tokens of an answer (default: 30)", type=at_least(1))
    tag_scheme: str | None = of_a_task(
        "how NER's tags are written (default: inferred from the training file)", choices=SCHEMES
    )

    def __post_init__(self) -> None:
        """Raise ValueError for options that do not go together."""
        require_distinct("--seeds", self.seeds)
        for flag, value in (("--distill-weight", self.distill_weight), ("--temperature", self.temperature)):
            if value is not None and self.teacher is None:
                raise ValueError(f"{flag} goes with --teacher; name a run, or leave it out")
        if self.teacher and self.is_baseline:
            raise ValueError(f"--teacher: {self.checkpoint} is not a network that could learn from it; leave it out")
        if self.rescale_embeddings and (self.is_baseline or self.checkpoint == "random"):
            raise ValueError("--rescale-embeddings goes with a pretrained --checkpoint; leave it out")
        if self.cache and self.cache.exists() and not self.cache.is_dir():
            raise ValueError(f"--cache {self.cache} is a file; name a folder, which need not exist")

    @property
    def is_baseline(self) -> bool:
        """Whether --checkpoint names a baseline without a network."""
        return self.checkpoint in BASELINES

    @property
    def distillation(self) -> dict[str, float]:
        """Keyword arguments of `evaluation.distill.distill`."""
        return {"weight": self.distill_weight or 0.5, "temperature": self.temperature or 2.0}


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(SharedOptions):
    """Fine-tune a pretrained BERT on a task, with several seeds.

    The dev set is evaluated after every epoch; the scores go to OUTPUT/results.json and are printed. Repeating the
    command keeps the seeds that are finished; further --seeds are added to them.
    """

    learning_rate: float = training("peak learning rate of AdamW", default=5e-5, type=number(above=0, below=1))
    batch_size: int = training("examples per step, over all ranks", default=32, type=at_least(1))
    epochs: int = training("passes over the training examples", default=3, type=at_least(1))
    local_rank: int | None = option(None, default=None, flags=("--local_rank",))  # DeepSpeed's launcher passes it


def require_distinct(flag: str, values: tuple) -> None:
    """Raise ValueError if a value is given twice."""
    if len(set(values)) < len(values):
        raise ValueError(f"{flag} {' '.join(map(str, values))}: give each value once")


def check_batch_size(options: FinetuneOptions, num_ranks: int) -> None:
    """Raise ValueError unless a batch splits evenly over the ranks, and each rank's share into micro-batches."""
    part, rest = divmod(options.batch_size, num_ranks)
    if rest or not part:
        near = [size for size in (part * num_ranks, (part + 1) * num_ranks) if size]
        raise ValueError(
            f"--batch-size {options.batch_size} cannot be split over {num_ranks} ranks; choose from {near} or another "
            f"multiple of {num_ranks}"
        )
    if options.micro_batch_size and part % options.micro_batch_size:
        raise ValueError(
            f"--micro-batch-size {options.micro_batch_size} does not divide the {part} examples per step of each of "
            f"{num_ranks} ranks; choose from {[size for size in range(1, part + 1) if part % size == 0]}"
        )


def resolve_settings(options: FinetuneOptions, task: Task, start: Start | None, num_train: int, num_dev: int) -> dict:
    """Everything that determines the results of a seed, as run.json holds it; `start` is None for a baseline.

    Raises ValueError for a sequence length that does not fit the model, and for an invalid DeepSpeed file.
    """
    paths = {"train": options.data_dir / task.train_file, "dev": options.data_dir / task.dev_file}
    settings = {
        "task": task.settings,
        "checkpoint": options.checkpoint,
        **{split: {"file": str(path), "sha256": sha256_of(path)} for split, path in paths.items()},
        "num_train": num_train,
        "num_dev": num_dev,
    }
    if start is None:
        return settings
    longest, seq_length = start.config.max_position_embeddings, options.seq_length or task.seq_length
    if seq_length > longest:
        raise ValueError(f"--seq-length {seq_length}: the model has {longest} positions; choose at most that")
    if seq_length < task.settings.get("max_query_length", 1) + 4:
        raise ValueError(
            f"--seq-length {seq_length} leaves no room for a passage after a question of up to "
            f"{task.settings['max_query_length']} tokens; lower --max-query-length"
        )
    return {
        **settings,
        "weights": start.weights and {"path": str(start.weights.path), **start.weights.identity()},
        "model": start.config.to_json(),
        "vocab": start.tokenizer.describe(),
        "seq_length": seq_length,
        **{name: getattr(options, name) for name in COPIED_SETTINGS},
        "deepspeed_config": deepspeed_settings(options),
    }


def sha256_of(path: Path) -> str:
    """The sha256 of a file; for a folder of texts, the sha256 of the list of their names and hashes."""
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in text_files(path):
        digest.update(f"{file.relative_to(path)} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


def deepspeed_settings(options: FinetuneOptions) -> dict:
    """The DeepSpeed configuration of a run: precision and ZeRO from the user's file, the rest from the flags.

    The micro-batch size is left out, because it changes only the dropout masks. Raises ValueError for an unknown key, a
    key that a flag sets, an invalid value, and fp16 without a GPU.
    """
    name = str(options.deepspeed_config or "--set")
    own = read_with_overrides(options.deepspeed_config, options.overrides)
    for key in KEYS_OF_FLAGS:
        if key in own:
            raise ValueError(f"{name}: {key!r} is set by a flag of this command (see --help); leave it out")
    check_engine_settings(own, name)
    check_device_precision(precision_of(own))
    optimizer = {"lr": options.learning_rate, "betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": options.weight_decay}
    return {
        **own,
        "train_batch_size": options.batch_size,
        "gradient_clipping": MAX_GRAD_NORM,
        "optimizer": {"type": "AdamW", "params": optimizer},
        # The number of steps is added when the training examples have been encoded.
        "scheduler": {"type": "WarmupPolynomialLR", "params": {"warmup_proportion": options.warmup_proportion}},
    }
