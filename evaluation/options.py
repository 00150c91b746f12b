"""The command line of `evaluation.finetune`: its arguments, the checks that need no work, and what they resolve to."""

import argparse
import hashlib
import math
import sys
from pathlib import Path

from data_prep.files import read_json, sha256_file
from data_prep.text.tokenizer import add_case_arguments
from evaluation.baselines import BASELINES
from evaluation.start import Start
from evaluation.tasks.by_name import SQUAD_FLAGS, TASK_HELP
from evaluation.tasks.conll import SCHEMES
from evaluation.tasks.rows import text_files
from evaluation.tasks.task import Task
from pretrain.deepspeed_config import check_engine_settings

CHECKPOINT_HELP = (
    "a pretraining run or one of its checkpoints, or a Hugging Face folder; 'random' for the same model without "
    "pretraining; 'majority' or 'ngram' for a baseline without a network"
)
OPTIONS_OF_PREDICT = ("predict", "output", "seeds", "local_rank")
KEPT_FLAGS = ("epochs", "patience", "batch_size", "rescale_embeddings", "keep_weights")  # as they are
MAX_GRAD_NORM = 1.0
# What a flag of this command states has no second home in a DeepSpeed file.
KEYS_OF_FLAGS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "optimizer", "scheduler"),
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `--help` is written for a newcomer. Raises ValueError for an option that --predict ignores."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.finetune",
        description="Fine-tune a pretrained BERT on a task, with several seeds. The dev set is evaluated after every "
        "epoch; the scores go to OUTPUT/results.json and are printed. The same command again keeps the seeds that are "
        "finished; other --seeds are added to them.",
        allow_abbrev=False,  # `evaluation.grid` looks for whole names
    )
    fine_tuning = not any(flag.startswith("--predict") for flag in (sys.argv[1:] if argv is None else argv))
    what = parser.add_argument_group("what is learnt, and from where")
    what.add_argument("--task", required=fine_tuning, metavar="NAME", help=TASK_HELP)
    what.add_argument("--checkpoint", required=fine_tuning, metavar="WHERE", help=CHECKPOINT_HELP)
    what.add_argument("--data-dir", required=fine_tuning, type=Path, metavar="DIR", help="folder of the task's files")
    what.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write; empty or missing")
    what.add_argument(
        "--predict",
        type=Path,
        metavar="FILE",
        help="no training: the model that a finished run in OUTPUT kept answers a file without labels; goes with "
        "--output and, to name the seed, --seeds",
    )
    what.add_argument("--train-file", metavar="NAME", help="file in DATA-DIR, if not the task's usual one")
    what.add_argument("--dev-file", metavar="NAME", help="file in DATA-DIR, if not the task's usual one")
    what.add_argument(
        "--max-train-examples",
        type=int,
        metavar="N",
        help="only N training examples, the same for every seed: of each label its share, drawn by chance",
    )
    what.add_argument("--model", metavar="NAME", help="preset or config.json, for --checkpoint random")
    what.add_argument(
        "--vocab", type=Path, metavar="FILE", help="vocabulary, for --checkpoint random and for folders without one"
    )
    add_case_arguments(what)
    what.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder that keeps what was tokenised, for any number of runs: the same file is not tokenised again with "
        "the same vocabulary and lengths",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--seeds", nargs="+", action="extend", type=int, metavar="N", help="one run each, in turn (default 0 1 2)"
    )
    how.add_argument(
        "--epochs", type=int, default=3, metavar="N", help="passes over the training examples (default %(default)s)"
    )
    how.add_argument(
        "--patience",
        type=int,
        metavar="N",
        help="stop a seed after N epochs without a better dev score (default: never)",
    )
    how.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="examples a step, over all ranks (default %(default)s)"
    )
    how.add_argument(
        "--micro-batch-size",
        type=int,
        metavar="N",
        help="examples a rank computes at once; the gradients of a step are added up (default: its whole share)",
    )
    how.add_argument(
        "--learning-rate", type=float, default=5e-5, metavar="X", help="peak rate of AdamW (default %(default)s)"
    )
    how.add_argument(
        "--warmup-proportion",
        type=float,
        default=0.1,
        metavar="X",
        help="share of steps with a rising rate (default %(default)s)",
    )
    how.add_argument(
        "--weight-decay",
        type=float,
        default=0.01,
        metavar="X",
        help="none on biases and LayerNorm (default %(default)s)",
    )
    how.add_argument(
        "--rescale-embeddings",
        action="store_true",
        help="make them as large as drawn ones, which changes no output: for a checkpoint whose weights large steps of "
        "LAMB made grow, so that AdamW can move them",
    )
    how.add_argument(
        "--dropout", type=float, metavar="X", help="of hidden states and attention (default: what the checkpoint had)"
    )
    how.add_argument(
        "--max-seq-length",
        type=int,
        metavar="N",
        help="tokens a sequence: sentences are cut to them, documents and long sentences read in windows (default 128; "
        "SQuAD 384)",
    )
    how.add_argument(
        "--doc-stride", type=int, metavar="N", help="SQuAD: a window on the passage every N tokens (default 128)"
    )
    how.add_argument(
        "--teacher",
        type=Path,
        metavar="RUN",
        help="a finished run of the same task and vocabulary, whose answers to the training examples are learnt beside "
        "their labels (distillation)",
    )
    how.add_argument("--distill-weight", type=float, metavar="A", help="its share of the loss (default 0.5)")
    how.add_argument("--temperature", type=float, metavar="T", help="softens its answers (default 2)")
    how.add_argument("--max-query-length", type=int, metavar="N", help="SQuAD: tokens of a question (default 64)")
    how.add_argument("--max-answer-length", type=int, metavar="N", help="SQuAD: tokens of an answer (default 30)")
    how.add_argument("--tag-scheme", choices=SCHEMES, help="NER: how tags are written (default: told by the file)")
    how.add_argument(
        "--keep-weights",
        choices=("last", "best", "none"),
        default="last",
        help="which epoch of each seed is kept as a Hugging Face folder, SEED/model (default %(default)s)",
    )
    how.add_argument(
        "--deepspeed_config", type=Path, metavar="FILE", help="DeepSpeed JSON with precision and ZeRO only"
    )
    how.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    args = parser.parse_args(argv)
    given = (name for name, value in vars(args).items() if value != parser.get_default(name))
    for name in given if args.predict else ():
        if name not in OPTIONS_OF_PREDICT:
            flag = name if name == "deepspeed_config" else name.replace("_", "-")
            raise ValueError(f"--{flag} does not go with --predict: the run in --output has its own; leave it out")
    return args


def check_numbers(args: argparse.Namespace, num_ranks: int) -> None:
    """Raise ValueError for a number that no run can have."""
    for name in ("epochs", "patience", "batch_size", "micro_batch_size", "max_train_examples", *SQUAD_FLAGS):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1 is due")
    if not 0 < args.learning_rate < 1:
        raise ValueError(f"--learning-rate {args.learning_rate:g}: a number above 0 and below 1 is due, such as 5e-5")
    if not 0 <= args.warmup_proportion <= 1:
        raise ValueError(f"--warmup-proportion {args.warmup_proportion:g}: a share between 0 and 1 is due, such as 0.1")
    if not 0 <= args.weight_decay < 1:
        raise ValueError(f"--weight-decay {args.weight_decay:g}: a number from 0 to below 1 is due, such as 0.01")
    if args.seeds and (min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds)):
        raise ValueError(f"--seeds {' '.join(map(str, args.seeds))}: different whole numbers from 0 on are due")
    for name, low, high in (("distill_weight", 0, 1), ("temperature", 0, math.inf)):
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if value is not None and not low < value <= high:
            raise ValueError(f"{flag} {value:g}: a number above {low}{' and up to 1' * (high == 1)} is due")
        if value is not None and args.teacher is None:
            raise ValueError(f"{flag} goes with --teacher; name a run, or leave it out")
    if args.teacher and args.checkpoint in BASELINES:
        raise ValueError(f"--teacher: {args.checkpoint} is no network that could learn of it; leave it out")
    if args.rescale_embeddings and args.checkpoint in (*BASELINES, "random"):
        raise ValueError("--rescale-embeddings goes with a pretrained --checkpoint; leave it out")
    if args.cache and args.cache.exists() and not args.cache.is_dir():
        raise ValueError(f"--cache {args.cache} is a file; name a folder, which need not exist")
    if num_ranks > 1 and args.checkpoint in BASELINES:
        raise ValueError(
            f"--checkpoint {args.checkpoint} runs in one process; start it with plain python, without a launcher"
        )
    share, rest = divmod(args.batch_size, num_ranks)
    if rest or not share:
        near = [size for size in (share * num_ranks, (share + 1) * num_ranks) if size]
        raise ValueError(
            f"--batch-size {args.batch_size} cannot be split over {num_ranks} ranks; choose from {near} or another "
            f"multiple of {num_ranks}"
        )
    if args.micro_batch_size and share % args.micro_batch_size:
        raise ValueError(
            f"--micro-batch-size {args.micro_batch_size} does not divide the {share} examples that each of {num_ranks} "
            f"ranks has of a step; choose from {[size for size in range(1, share + 1) if share % size == 0]}"
        )


def resolve_settings(args: argparse.Namespace, task: Task, start: Start | None, train: list, dev: list) -> dict:
    """All that determines the results of a seed, as run.json has it; checks what depends on the model."""
    paths = {"train": args.data_dir / task.train_file, "dev": args.data_dir / task.dev_file}
    data = {split: {"file": str(path), "sha256": sha256_of(path)} for split, path in paths.items()}
    settings = {
        "task": task.settings,
        "checkpoint": args.checkpoint,
        **data,
        "num_train": len(train),
        "num_dev": len(dev),
    }
    if start is None:
        return settings
    longest, max_seq_length = start.config.max_position_embeddings, args.max_seq_length or task.max_seq_length
    if not 5 <= max_seq_length <= longest:
        raise ValueError(
            f"--max-seq-length {max_seq_length}: the model has positions for {longest} tokens; choose 5 to that"
        )
    if max_seq_length < task.settings.get("max_query_length", 1) + 4:
        raise ValueError(
            f"--max-seq-length {max_seq_length} leaves no room for a passage beside a question of up to "
            f"{task.settings['max_query_length']} tokens; lower --max-query-length"
        )
    return {
        **settings,
        "weights": start.weights and {"path": str(start.weights.path), **start.weights.identity()},
        "model": start.config.to_json(),
        "vocab": start.tokenizer.describe(),
        "max_seq_length": max_seq_length,
        **{name: getattr(args, name) for name in KEPT_FLAGS},
        "deepspeed_config": deepspeed_settings(args),
    }


def distillation(args: argparse.Namespace) -> dict[str, float]:
    """The weight and the temperature of `evaluation.distill.distill`."""
    return {"weight": args.distill_weight or 0.5, "temperature": args.temperature or 2.0}


def sha256_of(path: Path) -> str:
    """Of a file; of a folder of texts that of their names and sha256."""
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in text_files(path):
        digest.update(f"{file.relative_to(path)} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


def deepspeed_settings(args: argparse.Namespace) -> dict:
    """The DeepSpeed file of this run: the user's precision and ZeRO, and what the flags say. How a batch is cut up is
    not in it: that changes nothing but dropout's masks.
    """
    own = {} if args.deepspeed_config is None else read_json(args.deepspeed_config, dict)
    for key in KEYS_OF_FLAGS:
        if key in own:
            raise ValueError(f"{args.deepspeed_config}: {key!r} is set by a flag here (see --help); leave it out")
    check_engine_settings(own, str(args.deepspeed_config))
    optimizer = {"lr": args.learning_rate, "betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": args.weight_decay}
    schedule = {"warmup_proportion": args.warmup_proportion}  # over as many steps as the training takes
    return {
        **own,
        "train_batch_size": args.batch_size,
        "gradient_clipping": MAX_GRAD_NORM,
        "optimizer": {"type": "AdamW", "params": optimizer},
        "scheduler": {"type": "WarmupPolynomialLR", "params": schedule},
    }
