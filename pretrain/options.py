"""The trainer's command line and its inputs, read and checked before training starts."""

import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data_prep.cli import at_least, number, option
from data_prep.files import claim_output, sha256_file, write_json
from data_prep.shards import MANIFEST, Shards
from data_prep.text.tokenizer import load_tokenizer
from data_prep.text.vocab_files import Folding
from pretrain.checkpoint import remove_partial_checkpoints
from pretrain.costs import DEVICES, Device, PlannedRun, find_device
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
from pretrain.model_config import ModelConfig, load_model_config
from pretrain.plan import PhaseOptions, report
from pretrain.run_lock import locked_run_folder
from pretrain.telemetry import LOGS, peak_flops
from pretrain.weights import Weights, missing_heads, start_weights

rhythm, positive = partial(option, group="length and rhythm"), at_least(1)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(PhaseOptions):
    r"""Pre-train BERT on masked shards under the DeepSpeed engine.

        deepspeed --module pretrain.train --model large --data DIR --eval-data DIR --output DIR \
            --deepspeed-config ds_configs/FILE.json --tensor-parallel 2

    torchrun, and srun with one task per rank, run the same command; `python -m pretrain.train` runs a single rank.
    Repeating the command resumes from the newest checkpoint in --output, as if the run had not stopped.

    SIGTERM, SIGUSR1 or a file STOP in --output saves after the current step and ends the run with exit code 0. The run
    is complete when finished.json is there. Exit code 1: the run cannot continue, for instance because its loss is not
    finite; 2: a wrong input, or a full disk.
    """

    output: Path = option("run folder: checkpoints, metrics.jsonl, TensorBoard", metavar="DIR")
    data: tuple[str, ...] = option(
        "folder of masked shards; or several, each with the weight of its share of every batch: books=3 news=1",
        metavar="DIR[=WEIGHT]",
    )
    eval_data: Path | None = option("shards of held-out text; without them nothing is evaluated", default=None)
    init_from: Path | None = option(
        "weights to start from, at step 0: a Hugging Face folder, a run or checkpoint of ours, or Google's"
        " bert_model.ckpt; otherwise they are drawn from the seed",
        default=None,
        one_of="start",
    )
    continue_from: Path | None = option(
        "run or checkpoint of ours whose weights and optimizer moments are kept; the schedule restarts at step 0",
        default=None,
        one_of="start",
        metavar="RUN",
    )
    masks: str = option(
        "stored: the shards' masks in every epoch; dynamic: new ones in each",
        default="stored",
        choices=("stored", "dynamic"),
    )
    dropout: float | None = option("of hidden states and attention; if not given, the model's own", default=None)
    seed: int = option("of initial weights, data order and dropout", default=1234, type=at_least(0))
    deterministic: bool = option("make a GPU repeat itself bit for bit; a CPU always does", default=False)
    dry_run: bool = option("print the settings and the predicted cost of the run, and write nothing", default=False)
    steps: int | None = rhythm("steps of the phase; if not given, the schedule's own", default=None, type=positive)
    stop_after: int | None = rhythm(
        "save and stop after this step; the same command without it resumes", default=None, type=positive
    )
    log_interval: int = rhythm("steps between rows of metrics.jsonl", default=10, type=positive)
    log_tensors: bool = rhythm("also log LAMB's norms and trust ratios of every tensor", default=False)
    wandb: str | None = rhythm(
        "also send the rows to Weights & Biases; without a network: WANDB_MODE=offline", default=None, metavar="PROJECT"
    )
    eval_interval: int = rhythm(
        "steps between evaluations; the last step is always evaluated", default=1000, type=positive
    )
    save_interval: int = rhythm("steps between checkpoints; the last step is always saved", default=1000, type=positive)
    keep_checkpoints: int = rhythm("number of the newest checkpoints to keep", default=2, type=positive)
    keep_every: int | None = rhythm(
        "also keep the checkpoints of every K-th step", default=None, type=positive, metavar="K"
    )
    timeout: float = rhythm(
        "minutes that a rank waits for the others before it fails", default=10, type=number(above=0)
    )
    spike_factor: float | None = rhythm(
        "report a loss above this many times its running mean", default=None, type=number(above=1)
    )
    skip_spikes: bool = rhythm("skip the updates of steps that --spike-factor reports", default=False)
    local_rank: int | None = option(None, default=None, flags=("--local_rank",))  # DeepSpeed's launcher passes it

    def __post_init__(self):
        if self.skip_spikes and self.spike_factor is None:
            raise ValueError(
                "--skip-spikes needs --spike-factor to say what a spike is; give it too, 2 for twice the mean loss"
            )
        if self.wandb and importlib.util.find_spec("wandb") is None:
            raise ValueError(f"--wandb {self.wandb} needs the package wandb: pip install wandb, or leave --wandb out")


# Options that may change when a run resumes: the layout, recomputation, how often something is written.
CHANGEABLE = (
    *("tensor_parallel", "sequence_parallel", "recompute", "deterministic"),
    *("log_interval", "log_tensors", "eval_interval", "save_interval", "keep_checkpoints", "keep_every"),
    *("stop_after", "timeout", "spike_factor", "wandb"),
)


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """The checked inputs of a run."""

    options: TrainOptions
    model: ModelConfig
    deepspeed: dict
    data: list[tuple[Shards, Fraction]]  # data sets and their weights
    eval_shards: Shards | None
    start: Weights | None  # of --init-from or --continue-from

    @property
    def total_steps(self) -> int:
        return self.deepspeed["scheduler"]["params"]["total_num_steps"]

    @property
    def micro_batch_size(self) -> int:
        return self.deepspeed["train_micro_batch_size_per_gpu"]

    def identity(self) -> dict:
        """Everything that losses and scores depend on, with defaults filled in. Equal identities mean the same run."""
        total = sum(weight for _, weight in self.data)
        data = [[sha256_file(shards.folder / MANIFEST), str(weight / total)] for shards, weight in self.data]
        values = {
            "model": dataclasses.asdict(self.model),
            "data": data if len(data) > 1 else data[0][0],
            "eval_data": sha256_file(self.eval_shards.folder / MANIFEST) if self.eval_shards else None,
            "vocab": self.data[0][0].manifest["vocab"]["sha256"],
            "deepspeed": settings_of_results(self.deepspeed),
            "seed": self.options.seed,
        }
        if self.options.masks != "stored":
            values["masks"] = self.options.masks
        if self.options.skip_spikes:
            values["skip_spikes"] = self.options.spike_factor
        if self.start is not None:
            values["continue_from" if self.options.continue_from else "init_from"] = self.start.identity()
        return values

    def changeable(self) -> dict:
        """The settings that may change when the run resumes, for launches.jsonl."""
        fixed = {*settings_of_results(self.deepspeed), "data_types", "bf16", "fp16"}
        values = {name: getattr(self.options, name) for name in CHANGEABLE}
        return values | {"deepspeed": {key: value for key, value in self.deepspeed.items() if key not in fixed}}


def prepare_run(options: TrainOptions, world_size: int) -> TrainingRun:
    """Read and check all inputs. Raises ValueError before anything is written or any process group starts."""
    check_layout(world_size, options.tensor_parallel, options.sequence_parallel)
    steps = (f"scheduler.params.total_num_steps={options.steps}",) if options.steps else ()
    deepspeed = load_deepspeed_config(options.deepspeed_config, [*options.overrides, *steps])
    num_accumulation_steps(deepspeed, world_size // options.tensor_parallel)
    if not options.dry_run:
        check_device_precision(precision_of(deepspeed))
    data = open_data(options.data)
    shards = data[0][0]
    settings = shards.manifest["config"]
    model = load_model_config(options.model, shards.manifest["vocab"]["size"]).with_dropout(options.dropout)
    model = dataclasses.replace(model, pair_task=settings["pair_task"])
    model.check_tensor_parallel(options.tensor_parallel)
    if settings["seq_length"] > model.max_position_embeddings:
        raise ValueError(
            f"{shards.folder}: seq_length={settings['seq_length']} exceeds the model's"
            f" max_position_embeddings={model.max_position_embeddings}"
        )
    eval_shards = Shards(options.eval_data) if options.eval_data else None
    if eval_shards:
        check_compatible(eval_shards, shards, ("seq_length", "pair_task"))
    start = None
    if path := options.init_from or options.continue_from:
        start = start_weights(path, model, shards.vocab_file)
    if options.continue_from:
        _check_has_moments(start)
    return TrainingRun(
        options=options, model=model, deepspeed=deepspeed, data=data, eval_shards=eval_shards, start=start
    )


def open_data(arguments: tuple[str, ...]) -> list[tuple[Shards, Fraction]]:
    """Open the data sets of --data with their weights: DIR alone, or several DIR=WEIGHT.

    Raises ValueError for a missing or non-positive weight, for a folder that is named twice, and for data sets whose
    samples or masking rules differ in kind.
    """
    data: dict[Path, tuple[Shards, Fraction]] = {}
    for argument in arguments:
        folder, equals, weight = argument.rpartition("=")
        if not equals or Path(argument).is_dir():  # a folder's name may hold an equals sign
            folder, weight = argument, "1" if len(arguments) == 1 else ""
        shards, key = Shards(folder), Path(folder).resolve()
        if key in data:
            raise ValueError(f"--data names {folder} twice; give it once, with the sum of the weights")
        data[key] = shards, _weight(weight, argument)
    data_sets = [shards for shards, _ in data.values()]
    for shards in data_sets[1:]:
        check_compatible(shards, data_sets[0], ("seq_length", "pair_task", *MASKING_SETTINGS))
    return list(data.values())


def _weight(text: str, argument: str) -> Fraction:
    """The weight as an exact fraction; ValueError unless it is a positive number."""
    try:
        weight = Fraction(text)
    except (ValueError, ZeroDivisionError):
        problem = f"{text!r} is not a number" if text else "its weight is missing"
        raise ValueError(
            f"--data {argument}: {problem}; several data sets are given as DIR=WEIGHT, with numbers above 0:"
            " books=3 news=1"
        ) from None
    if weight <= 0:
        raise ValueError(f"--data {argument}: a weight must be above 0; to exclude a folder, do not name it")
    return weight


def check_compatible(shards: Shards, others: Shards, keys: tuple[str, ...]) -> None:
    """Raise ValueError unless two folders have the same vocabulary, folding and settings `keys`."""
    vocab, other_vocab = shards.manifest["vocab"], others.manifest["vocab"]
    if vocab["sha256"] != other_vocab["sha256"]:
        raise ValueError(
            f"{shards.folder} and {others.folder} have different vocabularies; build both with the same file"
        )
    settings = {key: (shards.manifest["config"][key], others.manifest["config"][key]) for key in keys}
    settings |= {key: (vocab[key], other_vocab[key]) for key in Folding._fields if key in vocab and key in other_vocab}
    for key, (found, expected) in settings.items():
        if found != expected:
            raise ValueError(
                f"{shards.folder} has {key}={found}, but {others.folder} has {key}={expected}; build both with the"
                " same value"
            )


def _check_has_moments(start: Weights) -> None:
    """Raise ValueError unless the weights are one of our checkpoints, with all heads of the model."""
    if not (start.path / "checkpoint.json").is_file():
        raise ValueError(
            f"--continue-from {start.path}: not one of our runs or checkpoints, so it has no optimizer moments;"
            " --init-from starts from its weights alone"
        )
    if missing := missing_heads(start):
        raise ValueError(
            f"--continue-from {start.path} has no {', '.join(missing)}; train on shards with the pair task of that run,"
            " or start from its weights alone with --init-from"
        )


def dry_run(run: TrainingRun, world_size: int) -> str:
    """The resolved settings of a run, and the report of pretrain.plan for these ranks."""
    options, settings, on_gpu = run.options, run.data[0][0].manifest["config"], torch.cuda.is_available()
    num_local = min(world_size, torch.cuda.device_count()) if on_gpu else world_size
    mean_lengths = [shards.manifest["num_tokens"] / shards.num_sequences for shards, _ in run.data]
    device = this_gpu() if on_gpu else DEVICES["cpu"]
    planned = PlannedRun(
        model=run.model,
        deepspeed=run.deepspeed,
        num_nodes=world_size // num_local,
        gpus_per_node=num_local,
        tp_size=options.tensor_parallel,
        seq_length=settings["seq_length"],
        mean_length=float(np.average(mean_lengths, weights=[float(weight) for _, weight in run.data])),
        max_predictions=settings["max_predictions"],
        device=device,
        sequence_parallel=options.sequence_parallel,
        recompute=options.recompute,
        on_gpu=on_gpu,
    )
    resolved = {"options": vars(options), "model": run.model.to_json(), "deepspeed_config": run.deepspeed}
    text = json.dumps(resolved, indent=2, default=str)
    return f"{text}\n\n{report(planned, options.model)}\n\nCounted for {device.name}.\n\nNothing was written."


def this_gpu() -> Device:
    """This process's GPU. If DEVICES lacks it, memory and 16-bit peak are measured and the rest is an A100's."""
    name = torch.cuda.get_device_name()
    known, a100 = find_device(name), DEVICES["a100-80g"]
    if known:
        return known
    total, peak = torch.cuda.get_device_properties().total_memory, peak_flops(torch.device("cuda"))
    fp32 = peak * a100.peak_fp32 / a100.peak_16_bit
    title = f"{name}: memory and 16-bit peak as measured, all else as on an A100"
    return dataclasses.replace(a100, name=title, memory=total, peak_16_bit=peak, peak_fp32=fp32)


@contextmanager
def claimed_run_folder(run: TrainingRun) -> Iterator[None]:
    """Reserve --output for this run; write its identity, model, vocabulary and DeepSpeed config (given and derived)."""
    output = run.options.output
    claim_output(output, "pretrain.train", run.identity())
    with locked_run_folder(output):
        for name in LOGS:
            if (output / name).exists():
                read_rows(output / name)  # raises ValueError for a damaged one
        remove_partial_checkpoints(output)
        write_json(output / "config.json", run.model.to_json())
        write_json(output / "deepspeed_config.json", run.deepspeed)
        write_json(output / "deepspeed_engine_config.json", engine_config(run.deepspeed))
        load_tokenizer(run.data[0][0].vocab_file).save(output)
        yield
