"""CLI and the one fine-tuning loop: a task, a start and several seeds -> dev scores after every epoch.

    python -m evaluation.finetune --task rte --checkpoint runs/mini --data-dir glue/RTE --output runs/mini-rte
    deepspeed --num_accelerators 8 --module evaluation.finetune ...      # on several ranks; torchrun and srun too

As in the papers (Devlin et al. 2019, A.3; Mosbach et al. 2021): AdamW with bias correction, linear warm-up and decay,
dropout, gradients clipped to norm 1. Without `--deepspeed-config` the run is in float32 without ZeRO.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data_prep.cli import parse, run_cli
from data_prep.files import claim_output, mark_finished, write_json
from data_prep.text.tokenizer_json import tokenizer_json
from evaluation import run_folder
from evaluation.baselines import majority, ngram
from evaluation.cache import cached_features
from evaluation.distill import distill, find_teacher
from evaluation.export import export_model, whole_weights
from evaluation.inference import apply_model, mean_logits
from evaluation.options import FinetuneOptions, check_batch_size, resolve_settings
from evaluation.start import Start, fill_model, find_start, read_encoder, rescale_embeddings
from evaluation.tasks.by_name import find_task
from evaluation.tasks.classification import draw_examples
from evaluation.tasks.features import Features, epoch_batches, gather_batch
from evaluation.tasks.task import Scores, Task
from pretrain.engine import initialize_engine
from pretrain.layout import LONE_RANK, Layout, init_layout, rank_environment
from pretrain.schedule import learning_rate
from pretrain.watchdog import one_report_per_host, watch_rank
from pretrain.weights import Weights


class FinetuningRun(NamedTuple):
    """Everything that makes up a run, read and checked before any rank starts to train."""

    options: FinetuneOptions
    task: Task
    start: Start | None  # None: a baseline without a network
    train: list
    dev: list
    settings: dict
    teacher: list[Weights]  # for distillation; empty without it


class Split(NamedTuple):
    """A training or dev set: the task's examples and the model input encoded from them."""

    examples: Sequence
    features: Features


class TrainedSeed(NamedTuple):
    """The result of training one seed. Predictions and weights exist on the first rank only."""

    epochs: list[dict]  # per epoch: losses, dev scores, speed
    predictions: object  # on the dev set, after the last epoch
    weights: dict[str, Tensor]  # of the epoch that is kept; empty if no weights are kept


def main(argv: list[str] | None = None) -> None:
    """Check everything, claim the output folder, run the seeds that are not finished, print the table."""
    options = parse(FinetuneOptions, "evaluation.finetune", argv)
    ranks = LONE_RANK if options.is_baseline else rank_environment()
    with one_report_per_host(ranks["LOCAL_RANK"]):
        check_batch_size(options, ranks["WORLD_SIZE"])
        run = prepare_run(options)
        todo = [seed for seed in options.seeds if not run_folder.seed_result_file(options.output, seed).exists()]
        if ranks["RANK"] == 0:
            claim_run_folder(run, todo)
    if run.start is None:
        run_baseline(run, todo)
    elif todo:
        layout = init_layout()
        with watch_rank(layout, place="fine-tuning"):
            fine_tune(run, todo, layout)
        layout.close()
    if ranks["RANK"] == 0:
        finish_run(run)


def prepare_run(options: FinetuneOptions) -> FinetuningRun:
    """Read and check all input. Raises ValueError before anything is written or any process group starts."""
    task, start, teacher = find_task(options), None, []
    train, draw = draw_examples(
        task.read(options.data_dir / task.train_file, True), options.max_train_examples, task.labels
    )
    dev = task.read(options.data_dir / task.dev_file, True)
    if not options.is_baseline:
        start = find_start(options.checkpoint, options.model, options.vocab, options.dropout, options.cased)
        if options.keep_weights != "none":
            try:
                tokenizer_json(start.tokenizer)
            except ValueError as error:  # fail now rather than after the training
                raise ValueError(f"{error}; or keep no weights, with --keep-weights none") from error
    settings = resolve_settings(options, task, start, len(train), len(dev))
    if draw:
        settings["draw"] = draw
    if options.teacher:
        teacher = find_teacher(options.teacher, task, start.tokenizer, settings["seq_length"])
        settings["distillation"] = {"teacher": [one.identity() for one in teacher], **options.distillation}
    return FinetuningRun(options, task, start, train, dev, settings, teacher)


def claim_run_folder(run: FinetuningRun, todo: list[int]) -> None:
    """Claim --output for this run, and say which seeds are already finished."""
    options = run.options
    seed = todo[0] if todo else options.seeds[0]
    claim_output(options.output, "evaluation.finetune", run.settings, run_folder.seed_folder(Path(), seed).name)
    if "draw" in run.settings:
        print(run.settings["draw"])
    if len(todo) < len(options.seeds):
        print(f"already finished: seed {', '.join(str(seed) for seed in options.seeds if seed not in todo)}")


def finish_run(run: FinetuningRun) -> None:
    """Write and print the summary of all finished seeds."""
    options, task, settings = run.options, run.task, run.settings
    start = options.checkpoint if options.is_baseline or options.checkpoint == "random" else "pretrained"
    results = {
        "task": task.name,
        "start": start,
        "checkpoint": options.checkpoint,
        "metrics": list(task.metrics),
        "data": str(options.data_dir),
        "dev_sha256": settings["dev"]["sha256"],
        "model": settings.get("model"),
        "num_train": len(run.train),
        "num_dev": len(run.dev),
        **run_folder.summarize(run_folder.read_seeds(options.output), task.metrics),
    }
    write_json(options.output / run_folder.RESULTS_FILE, results)
    counts = f"{len(run.train):,} training and {len(run.dev):,} dev examples"
    print(f"{task.name} from {options.checkpoint}: {counts}, scores in percent")
    print(run_folder.seed_table(results))
    if details := run_folder.detail_table(results):
        print(f"\n{details}")


def run_baseline(run: FinetuningRun, seeds: list[int]) -> None:
    """Predict the dev set without a network; each seed's folder has the format of a fine-tuned one."""
    task, kind, is_regression = run.task, run.options.checkpoint, not run.task.labels
    for seed in tqdm(seeds, desc=f"{task.name} {kind}", unit="seed"):
        if kind == "majority":
            answers = majority(run.train, run.dev, is_regression)
        else:
            answers = ngram(run.train, run.dev, is_regression, seed)
        predictions = answers[:, None] if is_regression else np.eye(task.num_outputs)[answers]  # [num dev, L]
        epoch = {"epoch": 1, "scores": task.score(run.dev, predictions)}
        finish_seed(run, seed, [epoch], predictions)


def finish_seed(run: FinetuningRun, seed: int, epochs: list[dict], predictions: object) -> None:
    """Write the predictions after the last epoch, then the seed's finished.json."""
    folder = run_folder.seed_folder(run.options.output, seed)
    folder.mkdir(exist_ok=True)
    run.task.write(folder, run.dev, predictions)
    mark_finished(folder, seed=seed, best_epoch=run_folder.best_epoch(epochs, run.task.metrics[0]), epochs=epochs)


def fine_tune(run: FinetuningRun, seeds: list[int], layout: Layout) -> None:
    """Encode the examples once, train each seed and write its folder. Collective; only the first rank writes."""
    options, task, start, is_first = run.options, run.task, run.start, layout.rank == 0
    encoder = read_encoder(start)
    if options.rescale_embeddings:
        encoder = rescale_embeddings(encoder, start.config)
    train = Split(run.train, encode(run, "train", "training examples" if is_first else ""))
    dev = Split(run.dev, encode(run, "dev", "dev examples" if is_first else ""))
    if run.teacher:
        answers = mean_logits(run.teacher, task, train.features, layout)
        task, features = distill(task, train.features, answers, **options.distillation)
        train = train._replace(features=features)
    if is_first:
        print(f"training examples: {train.features.note}; dev examples: {dev.features.note}")
    for seed in seeds:
        model = task.head(start.config, layout, task.num_outputs)
        drawn = fill_model(model, encoder, seed)
        if is_first and encoder and seed == seeds[0]:
            print(f"not in the checkpoint, so drawn from each seed: {', '.join(drawn)}")
        folder = run_folder.seed_folder(options.output, seed)
        if is_first:
            folder.mkdir(exist_ok=True)
        with open(folder / "metrics.jsonl" if is_first else os.devnull, "w", encoding="utf-8", buffering=1) as log:
            trained = train_one_seed(run, model, layout, task, train, dev, seed, log)
        if trained.weights:
            length = run.settings["seq_length"]
            export_model(folder / "model", trained.weights, task, start.config, start.tokenizer, length)
        if is_first:
            finish_seed(run, seed, trained.epochs, trained.predictions)


def encode(run: FinetuningRun, split: str, name: str) -> Features:
    """The features of a split ("train" or "dev"), from --cache if they are there; `name` labels the progress bar."""
    task, settings, examples = run.task, run.settings, {"train": run.train, "dev": run.dev}[split]
    tokenize = partial(task.encode, run.start.tokenizer, examples, settings["seq_length"], name)
    if run.options.cache is None:
        return tokenize()
    identity = {"file": settings[split]["sha256"], "num_examples": len(examples), "task": task.settings}
    identity |= {"vocab": settings["vocab"], "seq_length": settings["seq_length"]}
    return cached_features(run.options.cache, identity, task.features, tokenize)


def train_one_seed(
    run: FinetuningRun, model: nn.Module, layout: Layout, task: Task, train: Split, dev: Split, seed: int, log: IO[str]
) -> TrainedSeed:
    """The loop over epochs: train, evaluate, keep weights, stop early. `log` is the open metrics.jsonl."""
    options, config = run.options, run.settings["deepspeed_config"]
    micro_batch_size = options.micro_batch_size or options.batch_size // layout.dp_size
    engine, optimizer = initialize_engine(model, config | {"train_micro_batch_size_per_gpu": micro_batch_size}, layout)
    num_steps = options.epochs * -(-len(train.features) // options.batch_size)  # an example may have several windows
    block = config["scheduler"]
    schedule = block | {"params": block["params"] | {"total_num_steps": num_steps}}
    epochs, step, weights = [], 0, {}
    bar = tqdm(None, f"{task.name} seed {seed}", num_steps, unit="step", dynamic_ncols=True, disable=layout.rank > 0)
    for epoch in range(1, options.epochs + 1):
        began, losses = time.perf_counter(), []
        for indices in epoch_batches(len(train.features), options.batch_size, seed, epoch):
            rate = learning_rate(schedule, options.learning_rate, step)
            losses.append(train_step(engine, optimizer, task, train.features, indices, rate, seed, step))
            step += 1
            row = {"kind": "train", "step": step, "loss": losses[-1], "learning_rate": rate}
            log.write(json.dumps(row) + "\n")
            bar.update()
        examples_per_s = len(train.examples) / (time.perf_counter() - began)
        dev_loss, logits = apply_model(engine.module, task, dev.features, layout)
        predictions, scores = answer(task, dev, logits, layout)
        losses = {"train_loss": float(np.mean(losses)), "dev_loss": dev_loss}
        epochs.append({"epoch": epoch, "step": step, **losses, "scores": scores, "examples_per_s": examples_per_s})
        log.write(json.dumps({"kind": "eval", **epochs[-1]}) + "\n")
        bar.set_postfix({name: run_folder.percent(scores[name]) for name in task.metrics})
        num_since_best = epoch - run_folder.best_epoch(epochs, task.metrics[0])
        if options.keep_weights == "best" and num_since_best == 0:
            weights = whole_weights(engine.module, layout)
        if num_since_best == options.patience:
            break
    bar.close()
    if options.keep_weights == "last":
        weights = whole_weights(engine.module, layout)
    engine.destroy()
    return TrainedSeed(epochs, predictions, weights)


def answer(task: Task, dev: Split, logits: list[Tensor], layout: Layout) -> tuple[object, Scores]:
    """The dev predictions, on the first rank only, and their scores, on all ranks."""
    predictions, scores = None, {}
    if layout.rank == 0:
        predictions = task.decode(dev.examples, dev.features, logits)
        scores = task.score(dev.examples, predictions)
    return predictions, layout.gather(scores)[0]


def train_step(
    engine, optimizer, task: Task, train: Features, indices: np.ndarray, rate: float, seed: int, step: int
) -> float:
    """One update on the sequences `indices` [B], which are split over the ranks. Returns the mean loss over all labels.
    Raises FloatingPointError on all ranks if the loss is not finite.

    The loss is the sum over all labels, divided by their number over all ranks and micro-steps. The factor dp_size
    undoes DeepSpeed's averaging of gradients over the ranks. The last batch of an epoch may have fewer sequences than
    parts. All ranks must run forward and backward together, so a rank with an empty part runs any sequence and
    multiplies its loss by zero.
    """
    layout, losses = engine.mpu, []
    for group in optimizer.param_groups:
        group["lr"] = rate
    num_targets = train.num_targets(indices)
    parts = np.array_split(indices, layout.dp_size * engine.gradient_accumulation_steps())
    for number in range(layout.dp_rank, len(parts), layout.dp_size):
        sequences, labels = gather_batch(train, parts[number] if len(parts[number]) else indices[:1])
        logits = engine(sequences.to(layout.device), (seed, step, number))
        loss = task.loss(logits, labels.to(layout.device), sequences).sum()
        loss = loss / num_targets if len(parts[number]) else loss * 0
        engine.backward(loss * layout.dp_size, scale_wrt_gas=False)
        engine.step()  # updates the weights only after the last part
        losses.append(loss.detach())
    loss = layout.sum_over_data_parallel(torch.stack(losses)).sum().item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"seed {seed}, step {step + 1}: the loss is {loss}; lower --learning-rate")
    return loss


if __name__ == "__main__":
    run_cli(main)
