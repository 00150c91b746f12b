"""The trainer's command line and all it names, read and checked before any rank starts to train."""

import argparse
import dataclasses
import importlib.util
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import IO

import numpy as np
import torch

from data_prep.files import claim_output, sha256_file, write_json
from data_prep.shards import MANIFEST, Shards
from data_prep.text.tokenizer import load_tokenizer
from pretrain.checkpoint import remove_partial_checkpoints
from pretrain.costs import DEVICES, Job
from pretrain.data import MASKING_SETTINGS
from pretrain.deepspeed_config import (
    engine_config,
    load_deepspeed_config,
    num_accumulation_steps,
    precision_of,
    settings_of_results,
)
from pretrain.layout import check_device_precision, check_layout
from pretrain.metrics_file import read_rows
from pretrain.model import RECOMPUTE
from pretrain.model_config import PRESETS, ModelConfig, load_model_config
from pretrain.plan import report
from pretrain.run_lock import lock_run_folder
from pretrain.telemetry import LOGS
from pretrain.weights import Weights, missing_heads, start_weights


def parse_args(argv: list[str] | None, description: str = __doc__) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pretrain.train", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    need = parser.add_argument_group("what is trained, on what, how")
    need.add_argument("--model", required=True, help=f"{', '.join(PRESETS)}, or a Hugging Face config.json")
    need.add_argument(
        "--data",
        required=True,
        nargs="+",
        action="extend",
        metavar="DIR[=WEIGHT]",
        help="folder of masked shards made by data_prep.build; or several, each with the weight of its share of every"
        " batch: books=3 news=1",
    )
    need.add_argument("--eval-data", type=Path, help="shards of held-out text; without it nothing is evaluated")
    need.add_argument(
        "--deepspeed_config", required=True, type=Path, help="DeepSpeed JSON of this phase, see ds_configs/README.md"
    )
    need.add_argument("--output", required=True, type=Path, help="run folder: checkpoints, metrics.jsonl, TensorBoard")
    need.add_argument(
        "--tensor-parallel", type=int, default=1, help="ranks that share one copy of the model (default 1)"
    )
    need.add_argument(
        "--sequence-parallel",
        action="store_true",
        help="split the activations between tensor-parallel products over those ranks too: less memory",
    )
    need.add_argument(
        "--recompute",
        choices=RECOMPUTE,
        default="none",
        help="what backward computes again instead of keeping it: attention (selective) or whole layers (full)",
    )
    need.add_argument(
        "--deterministic", action="store_true", help="a GPU repeats itself bit for bit, more slowly; a CPU always does"
    )
    start = need.add_mutually_exclusive_group()
    start.add_argument(
        "--init-from",
        type=Path,
        help="weights to start from, at step 0: a Hugging Face folder, a run or checkpoint of ours, or Google's"
        " bert_model.ckpt; default: drawn from the seed",
    )
    start.add_argument(
        "--continue-from",
        type=Path,
        metavar="RUN",
        help="run or checkpoint of ours whose weights and optimizer moments this phase goes on from; the schedule"
        " starts anew, at step 0",
    )
    need.add_argument(
        "--masks",
        choices=("stored", "dynamic"),
        default="stored",
        help="the shards' own masks in every epoch (stored, the default), or others in each (dynamic)",
    )
    need.add_argument("--dropout", type=float, help="of hidden states and attention; default: the model's own, 0.1")
    run = parser.add_argument_group("length and rhythm")
    run.add_argument(
        "--steps", type=int, help="steps of the phase; default: scheduler.params.total_num_steps of the config"
    )
    run.add_argument(
        "--stop-after", type=int, help="save and stop after this step; the same command without it goes on"
    )
    run.add_argument("--log-interval", type=int, default=10, help="steps between rows of metrics.jsonl (default 10)")
    run.add_argument(
        "--log-tensors", action="store_true", help="with each row, LAMB's norms and trust ratios of every tensor"
    )
    run.add_argument(
        "--wandb", metavar="PROJECT", help="send the rows to Weights & Biases, too; without network: WANDB_MODE=offline"
    )
    run.add_argument(
        "--eval-interval",
        type=int,
        default=1000,
        help="steps between evaluations (default 1000); the last step always has one",
    )
    run.add_argument(
        "--save-interval",
        type=int,
        default=1000,
        help="steps between checkpoints (default 1000); the last step always has one",
    )
    run.add_argument("--keep-checkpoints", type=int, default=2, help="checkpoints to keep, newest first (default 2)")
    run.add_argument(
        "--keep-every", type=int, metavar="K", help="keep the checkpoints of every K-th step for good, too"
    )
    run.add_argument(
        "--timeout",
        type=float,
        default=10,
        metavar="MINUTES",
        help="how long a rank waits for the others before it gives up (default 10)",
    )
    run.add_argument(
        "--spike-factor", type=float, help="tell of a loss above this many times its running mean; default: no"
    )
    run.add_argument(
        "--skip-spikes", action="store_true", help="leave out the updates of steps whose loss --spike-factor tells of"
    )
    run.add_argument(
        "--dry-run", action="store_true", help="print what the run would be and cost, write nothing and stop"
    )
    run.add_argument("--seed", type=int, default=1234, help="of initial weights, data order and dropout (default 1234)")
    run.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="overrides of the DeepSpeed config, in their order: optimizer.params.lr=0.004",
    )
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher passes it; the environment says it too
    return parser.parse_args(argv)


CHANGEABLE = (
    *("tensor_parallel", "sequence_parallel", "recompute", "deterministic"),
    *("log_interval", "log_tensors", "eval_interval", "save_interval", "keep_checkpoints", "keep_every"),
    *("stop_after", "timeout", "spike_factor", "wandb"),
)


@dataclasses.dataclass
class Plan:
    """Everything a run is made of, read and checked before any rank starts to train."""

    args: argparse.Namespace
    model: ModelConfig
    deepspeed: dict
    data: list[tuple[Shards, Fraction]]  # data sets and their weights
    eval_shards: Shards | None
    start: Weights | None

    @property
    def total_steps(self) -> int:
        return self.deepspeed["scheduler"]["params"]["total_num_steps"]

    @property
    def micro_batch_size(self) -> int:
        return self.deepspeed["train_micro_batch_size_per_gpu"]

    def identity(self) -> dict:
        """What makes two runs the same, with all defaults stated: what decides the numbers that are computed, and what
        they are measured on.
        """
        total = sum(weight for _, weight in self.data)
        data = [[sha256_file(shards.folder / MANIFEST), str(weight / total)] for shards, weight in self.data]
        values = {
            "model": dataclasses.asdict(self.model),
            "data": data if len(data) > 1 else data[0][0],
            "eval_data": sha256_file(self.eval_shards.folder / MANIFEST) if self.eval_shards else None,
            "vocab": self.data[0][0].manifest["vocab"]["sha256"],
            "deepspeed": settings_of_results(self.deepspeed),
            "seed": self.args.seed,
        }
        if self.args.masks != "stored":
            values["masks"] = self.args.masks
        if self.args.skip_spikes:
            values["skip_spikes"] = self.args.spike_factor
        if self.start is not None:
            values["continue_from" if self.args.continue_from else "init_from"] = self.start.identity()
        return values

    def changeable(self) -> dict:
        """What another start of the same run may change, for launches.jsonl: the layout, how a batch is cut, how often
        something is written.
        """
        kept = {*settings_of_results(self.deepspeed), "data_types", "bf16", "fp16"}
        values = {name: getattr(self.args, name) for name in CHANGEABLE}
        return values | {"deepspeed": {key: value for key, value in self.deepspeed.items() if key not in kept}}


def make_plan(args: argparse.Namespace, world_size: int) -> Plan:
    """Reads and checks all input; raises ValueError before anything is written or any process group starts."""
    check_layout(world_size, args.tensor_parallel, args.sequence_parallel)
    counts = ("steps", "stop_after", "log_interval", "eval_interval", "save_interval", "keep_checkpoints", "keep_every")
    for name in (*counts, "timeout"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value} is not a positive number")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} is negative; choose 0 or a number above it")
    if args.spike_factor is not None and not args.spike_factor > 1:
        raise ValueError(f"--spike-factor {args.spike_factor:g} is not above 1: every step would be a spike")
    if args.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"--wandb {args.wandb} needs the package wandb: pip install wandb, or leave --wandb out")
    if args.skip_spikes and args.spike_factor is None:
        raise ValueError(
            "--skip-spikes has to know what a spike is: give --spike-factor too, 2 for twice the mean loss"
        )
    overrides = args.set + ([f"scheduler.params.total_num_steps={args.steps}"] if args.steps else [])
    deepspeed = load_deepspeed_config(args.deepspeed_config, overrides)
    num_accumulation_steps(deepspeed, world_size // args.tensor_parallel)
    if not args.dry_run:
        check_device_precision(precision_of(deepspeed))
    data = open_data(args.data)
    shards = data[0][0]
    vocab = shards.manifest["vocab"]
    model = load_model_config(args.model, vocab["size"]).with_dropout(args.dropout)
    model = dataclasses.replace(model, pair_task=shards.manifest["config"]["pair_task"])
    model.check_tensor_parallel(args.tensor_parallel)
    seq_length = shards.manifest["config"]["seq_length"]
    if seq_length > model.max_position_embeddings:
        raise ValueError(
            f"{shards.folder}: sequences of {seq_length}, but max_position_embeddings={model.max_position_embeddings}"
        )
    eval_shards = Shards(args.eval_data) if args.eval_data else None
    if eval_shards:
        check_alike(eval_shards, shards, ("seq_length", "pair_task"))
    start = start_weights(args.init_from, model, shards.vocab_file) if args.init_from else None
    if args.continue_from:
        start = start_weights(args.continue_from, model, shards.vocab_file)
        _check_has_moments(start)
    return Plan(args, model, deepspeed, data, eval_shards, start)


def open_data(arguments: list[str]) -> list[tuple[Shards, Fraction]]:
    """The data sets that --data names, open, with their weights: DIR alone, or several DIR=WEIGHT.

    Raises ValueError for a weight that is missing or not positive, for a folder named twice, and for data sets that
    cannot be mixed: all have to hold samples of one kind, masked by one rule.
    """
    data: dict[Path, tuple[Shards, Fraction]] = {}
    for argument in arguments:
        folder, equals, weight = argument.rpartition("=")
        if not equals or Path(argument).is_dir():  # a folder's name may hold a sign of its own
            folder, weight = argument, "1" if len(arguments) == 1 else ""
        shards, key = Shards(folder), Path(folder).resolve()
        if key in data:
            raise ValueError(f"--data names {folder} twice; give it once, with the sum of the weights")
        data[key] = shards, _weight(weight, argument)
    data_sets = [shards for shards, _ in data.values()]
    for shards in data_sets[1:]:
        check_alike(shards, data_sets[0], ("seq_length", "pair_task", *MASKING_SETTINGS))
    return list(data.values())


def _weight(text: str, argument: str) -> Fraction:
    """A positive number, as exact as it is written."""
    try:
        weight = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"--data {argument}: {f'{text!r} is no number' if text else 'its weight is missing'}; several data sets"
            " are given as DIR=WEIGHT, with numbers above 0: books=3 news=1"
        ) from None
    if weight <= 0:
        raise ValueError(f"--data {argument}: a weight is a number above 0; leave the folder out to read nothing of it")
    return weight


def check_alike(shards: Shards, others: Shards, keys: tuple[str, ...]) -> None:
    """Raises ValueError that names the difference unless two folders have one vocabulary and the same settings."""
    if shards.manifest["vocab"]["sha256"] != others.manifest["vocab"]["sha256"]:
        raise ValueError(
            f"{shards.folder} and {others.folder} have different vocabularies; build both with the same file"
        )
    for key in keys:
        found, expected = (part.manifest["config"][key] for part in (shards, others))
        if found != expected:
            raise ValueError(
                f"{shards.folder} has {key}={found}, but {others.folder} has {key}={expected}; build both alike"
            )


def _check_has_moments(start: Weights) -> None:
    """Raises ValueError for weights that are no checkpoint of ours, or not of the whole model."""
    if not (start.path / "checkpoint.json").is_file():
        raise ValueError(
            f"--continue-from {start.path}: no run or checkpoint of ours, so it has no optimizer moments; --init-from"
            " starts from its weights alone"
        )
    if missing := missing_heads(start):
        raise ValueError(
            f"--continue-from {start.path} has no {', '.join(missing)}; train on shards with the pair task of that run,"
            " or start from its weights alone with --init-from"
        )


def dry_run(plan: Plan, world_size: int) -> str:
    """What a run would be and cost: its resolved settings and the answer of pretrain.plan, for the ranks at hand."""
    args, config = plan.args, plan.data[0][0].manifest["config"]
    on_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name().lower() if on_gpu else "cpu"
    kind = next((kind for kind in DEVICES if kind.partition("-")[0] in name), "a100-80g")
    num_local = min(world_size, torch.cuda.device_count() if on_gpu else world_size)
    mean_lengths = [shards.manifest["num_tokens"] / shards.num_sequences for shards, _ in plan.data]
    job = Job(
        *(plan.model, plan.deepspeed, world_size // num_local, num_local, args.tensor_parallel),
        config["seq_length"],
        float(np.average(mean_lengths, weights=[float(weight) for _, weight in plan.data])),
        *(config["max_predictions"], DEVICES[kind], args.sequence_parallel, args.recompute, on_gpu),
    )
    settings = {"arguments": vars(args), "model": plan.model.to_json(), "deepspeed_config": plan.deepspeed}
    told = (json.dumps(settings, indent=2, default=str), report(job, args.model), f"Counted for {kind}.")
    return "\n\n".join([*told, "Nothing was written."])


def claim_run_folder(plan: Plan) -> IO[str]:
    """Makes --output this run's own: identity, model, vocabulary, and both forms of the DeepSpeed config. Returns the
    lock that keeps other jobs out while it is open.
    """
    output = plan.args.output
    claim_output(output, "pretrain.train", plan.identity())
    lock = lock_run_folder(output)
    for name in LOGS:
        if (output / name).exists():
            read_rows(output / name)  # raises for a damaged one
    remove_partial_checkpoints(output)
    write_json(output / "config.json", plan.model.to_json())
    write_json(output / "deepspeed_config.json", plan.deepspeed)
    write_json(output / "deepspeed_engine_config.json", engine_config(plan.deepspeed))
    load_tokenizer(plan.data[0][0].vocab_file).save(output)
    return lock
