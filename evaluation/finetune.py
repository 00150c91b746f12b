"""CLI and the one fine-tuning loop: a task, a start, several seeds -> dev scores of every epoch, last and best apart.

    python -m evaluation.finetune --task rte --checkpoint runs/mini --data-dir glue/RTE --output runs/mini-rte
    deepspeed --num_accelerators 8 --module evaluation.finetune ...      # on several ranks; torchrun and srun too

As in the papers (Devlin et al. 2019, A.3; Mosbach et al. 2021): AdamW with bias correction, linear warm-up and decay,
dropout, gradients clipped to norm 1. Without `--deepspeed_config` the run is in float32 without ZeRO.
"""

import argparse
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
from torch import Tensor
from tqdm import tqdm

from data_prep.cli import run_cli
from data_prep.files import claim_output, write_json
from data_prep.text.tokenizer_json import tokenizer_json
from evaluation.baselines import BASELINES, majority, ngram
from evaluation.cache import cached_features
from evaluation.distill import distill, find_teacher
from evaluation.export import export_model, whole_weights
from evaluation.options import check_numbers, distillation, parse_args, resolve_settings
from evaluation.predict import apply_model, mean_logits, predict_file
from evaluation.run_folder import (
    RESULTS_FILE,
    best_epoch,
    detail_table,
    finish_seed,
    percent,
    read_seeds,
    seed_folder,
    seed_result_file,
    seed_table,
    summarize,
)
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


class Plan(NamedTuple):
    """Everything a run is made of, read and checked before any rank starts to train."""

    args: argparse.Namespace
    task: Task
    start: Start | None  # None: a baseline without a network
    train: list
    dev: list
    settings: dict
    teacher: list[Weights]  # of distillation; empty without it


def main(argv: list[str] | None = None) -> None:
    """Check everything, claim the output folder, run the seeds that are not finished, print the table."""
    args = parse_args(argv)
    ranks = LONE_RANK if args.predict else rank_environment()
    with one_report_per_host(ranks["LOCAL_RANK"]):
        check_numbers(args, ranks["WORLD_SIZE"])
        if args.predict:
            predict_file(args.output, args.predict, args.seeds)
            return
        plan = make_plan(args)
        todo = [seed for seed in args.seeds if not seed_result_file(args.output, seed).exists()]
        if ranks["RANK"] == 0:
            claim_run_folder(plan, todo)
    if plan.start is None:
        run_baseline(args.checkpoint, plan.task, plan.train, plan.dev, todo, args.output)
    elif todo:
        run_seeds(plan, todo)
    if ranks["RANK"] == 0:
        finish_run(plan)


def make_plan(args: argparse.Namespace) -> Plan:
    """Read and check all input; raises ValueError before anything is written or any process group starts."""
    args.seeds = args.seeds or [0, 1, 2]
    task = find_task(args)
    train = task.read(args.data_dir / task.train_file, True)
    train, draw = draw_examples(train, args.max_train_examples, task.labels)
    dev = task.read(args.data_dir / task.dev_file, True)
    start = (
        None
        if args.checkpoint in BASELINES
        else find_start(args.checkpoint, args.model, args.vocab, args.dropout, args.cased)
    )
    if start and args.keep_weights != "none":
        try:
            tokenizer_json(start.tokenizer)
        except ValueError as error:  # now, and not after the training
            raise ValueError(f"{error}; or keep no weights, with --keep-weights none") from error
    settings, teacher = resolve_settings(args, task, start, train, dev), []
    if draw:
        settings["draw"] = draw
    if args.teacher:
        teacher = find_teacher(args.teacher, task, start.tokenizer, settings["max_seq_length"])
        settings["distillation"] = {"teacher": [weights.identity() for weights in teacher], **distillation(args)}
    return Plan(args, task, start, train, dev, settings, teacher)


def claim_run_folder(plan: Plan, todo: list[int]) -> None:
    """Make --output this run's own, and say which seeds need no work."""
    args = plan.args
    seed = todo[0] if todo else args.seeds[0]
    claim_output(args.output, "evaluation.finetune", plan.settings, seed_folder(Path(), seed).name)
    if "draw" in plan.settings:
        print(plan.settings["draw"])
    if len(todo) < len(args.seeds):
        print(f"finished before and kept: seed {', '.join(str(seed) for seed in args.seeds if seed not in todo)}")


def finish_run(plan: Plan) -> None:
    """Write and print the summary of all finished seeds."""
    args, task, start, settings = plan.args, plan.task, plan.start, plan.settings
    kind = args.checkpoint if start is None else "random" if start.weights is None else "pretrained"
    head = {"task": task.name, "start": kind, "checkpoint": args.checkpoint, "metrics": list(task.metrics)}
    head |= {"data": str(args.data_dir), "dev_sha256": settings["dev"]["sha256"], "model": settings.get("model")}
    head |= {"num_train": len(plan.train), "num_dev": len(plan.dev)}
    results = summarize(read_seeds(args.output), head)
    write_json(args.output / RESULTS_FILE, results)
    counts = f"{len(plan.train):,} training and {len(plan.dev):,} dev examples"
    print(f"{task.name} from {args.checkpoint}: {counts}, scores in percent")
    print(seed_table(results))
    if details := detail_table(results):
        print(f"\n{details}")


def run_baseline(kind: str, task: Task, train: Sequence, dev: Sequence, seeds: list[int], output: Path) -> None:
    """Predict the dev rows without a network; each seed's folder is written in the format of a fine-tuned one."""
    is_regression = not task.labels
    for seed in tqdm(seeds, desc=f"{task.name} {kind}", unit="seed"):
        answers = majority(train, dev, is_regression) if kind == "majority" else ngram(train, dev, is_regression, seed)
        predictions = answers[:, None] if is_regression else np.eye(task.num_outputs)[answers]  # [num dev, L]
        epoch = {"epoch": 1, "scores": task.score(dev, predictions)}
        finish_seed(output, seed, task, [epoch], dev, predictions)


class Split(NamedTuple):
    """Training or dev set: the task's examples, and what the model reads of them."""

    examples: Sequence
    features: Features


def run_seeds(plan: Plan, seeds: list[int]) -> None:
    """Fine-tune on all ranks; a loss that is not finite ends them with exit code 1."""
    layout = init_layout()
    with watch_rank(layout, place="fine-tuning"):
        fine_tune(plan, seeds, layout)
    layout.close()


def fine_tune(plan: Plan, seeds: list[int], layout: Layout) -> None:
    """Encode the examples once, then run one seed after another and write each one's folder; collective. The first
    rank alone prints and writes.
    """
    args, task, start, is_first = plan.args, plan.task, plan.start, layout.rank == 0
    length, encoder = plan.settings["max_seq_length"], read_encoder(start)
    if args.rescale_embeddings:
        encoder = rescale_embeddings(encoder, start.config)
    train, dev = (
        Split(examples, encode(plan, examples, split, f"{name} examples" if is_first else ""))
        for examples, split, name in ((plan.train, "train", "training"), (plan.dev, "dev", "dev"))
    )
    if plan.teacher:
        answers = mean_logits(plan.teacher, task, train.features, layout)
        task, features = distill(task, train.features, answers, **distillation(args))
        train = train._replace(features=features)
    micro_batch_size = args.micro_batch_size or args.batch_size // layout.dp_size
    config = plan.settings["deepspeed_config"] | {"train_micro_batch_size_per_gpu": micro_batch_size}
    if is_first:
        print(f"training examples: {train.features.note}; dev examples: {dev.features.note}")
    for seed in seeds:
        model = task.head(start.config, layout, task.num_outputs)
        drawn = fill_model(model, encoder, seed)
        if is_first and encoder and seed == seeds[0]:
            print(f"not in the checkpoint, so drawn from each seed: {', '.join(drawn)}")
        engine, optimizer = initialize_engine(model, config, layout)
        folder = seed_folder(args.output, seed)
        if is_first:
            folder.mkdir(exist_ok=True)
        with open(folder / "metrics.jsonl" if is_first else os.devnull, "w", encoding="utf-8", buffering=1) as log:
            epochs, predictions, weights = train_one_seed(
                engine, optimizer, task, train, dev, plan.settings, seed, args.keep_weights, log
            )
        if weights:
            export_model(folder / "model", weights, task, start.config, start.tokenizer, length)
        if is_first:
            finish_seed(args.output, seed, task, epochs, dev.examples, predictions)
        engine.destroy()


def encode(plan: Plan, examples: list, split: str, name: str) -> Features:
    """The features of a split ("train" or "dev"), from --cache if they are there; `name` labels the progress bar."""
    task, settings = plan.task, plan.settings
    tokenize = partial(task.encode, plan.start.tokenizer, examples, settings["max_seq_length"], name)
    if plan.args.cache is None:
        return tokenize()
    identity = {"file": settings[split]["sha256"], "num_examples": len(examples), "task": task.settings}
    identity |= {"vocab": settings["vocab"], "max_seq_length": settings["max_seq_length"]}
    return cached_features(plan.args.cache, identity, task.features, tokenize)


def train_one_seed(
    engine, optimizer, task: Task, train: Split, dev: Split, settings: dict, seed: int, keep: str, log: IO[str]
) -> tuple[list[dict], object, dict[str, Tensor]]:
    """THE loop: every epoch's row (losses, dev scores, speed), the dev predictions after the last one, and the
    weights of the epoch that is kept ("last", "best"; {} for "none"); predictions and weights on the first rank alone.
    """
    layout, batch_size = engine.mpu, settings["batch_size"]
    num_steps = settings["epochs"] * -(-len(train.features) // batch_size)  # an example may be many windows
    block = settings["deepspeed_config"]["scheduler"]
    schedule = block | {"params": block["params"] | {"total_num_steps": num_steps}}
    peak_lr = settings["deepspeed_config"]["optimizer"]["params"]["lr"]
    epochs, step, weights = [], 0, {}
    bar = tqdm(None, f"{task.name} seed {seed}", num_steps, unit="step", dynamic_ncols=True, disable=layout.rank > 0)
    for epoch in range(1, settings["epochs"] + 1):
        began, losses = time.perf_counter(), []
        for indices in epoch_batches(len(train.features), batch_size, seed, epoch):
            rate = learning_rate(schedule, peak_lr, step)
            losses.append(train_step(engine, optimizer, task, train.features, indices, rate, seed, step))
            write_row(log, kind="train", step=step + 1, loss=losses[-1], learning_rate=rate)
            step += 1
            bar.update()
        examples_per_s = len(train.examples) / (time.perf_counter() - began)
        dev_loss, logits = apply_model(engine.module, task, dev.features, layout)
        predictions, scores = answer(task, dev, logits, layout)
        epochs.append({"epoch": epoch, "step": step, "train_loss": float(np.mean(losses)), "dev_loss": dev_loss,
                       "scores": scores, "examples_per_s": examples_per_s})  # fmt: skip
        write_row(log, kind="dev", **epochs[-1])
        bar.set_postfix({name: percent(scores[name]) for name in task.metrics})
        num_since_best = epoch - best_epoch(epochs, task.metrics[0])
        if keep == "best" and num_since_best == 0:
            weights = whole_weights(engine.module, layout)
        if num_since_best == settings["patience"]:
            break
    bar.close()
    return epochs, predictions, whole_weights(engine.module, layout) if keep == "last" else weights


def answer(task: Task, dev: Split, logits: list[Tensor], layout: Layout) -> tuple[object, Scores]:
    """The dev predictions, on the first rank alone, and their scores, of which it tells the others."""
    predictions, scores = None, {}
    if layout.rank == 0:
        predictions = task.decode(dev.examples, dev.features, logits)
        scores = task.score(dev.examples, predictions)
    return predictions, layout.gather(scores)[0]


def train_step(
    engine, optimizer, task: Task, train: Features, indices: np.ndarray, rate: float, seed: int, step: int
) -> float:
    """One update on the sequences `indices` [B] of all ranks: their mean loss. Raises FloatingPointError on all ranks
    if it is not finite.

    The loss is normalised by the step: the sum over all that has a label, divided by its number over all ranks and
    micro-steps. DeepSpeed averages gradients over the ranks, hence the factor. The last batch of an epoch may be
    smaller than its parts are many: the rank of an empty one computes another sequence and counts it as nothing, since
    forward and backward are collective.
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
        engine.step()  # before the last part it only counts
        losses.append(loss.detach())
    loss = layout.sum_over_data_parallel(torch.stack(losses)).sum().item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"seed {seed}, step {step + 1}: the loss is {loss}; lower --learning-rate")
    return loss


def write_row(log: IO[str], **row) -> None:
    """One row of metrics.jsonl."""
    log.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    run_cli(main)
