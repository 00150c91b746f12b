"""CLI and the one fine-tuning loop: a task, a start, several seeds -> dev scores of every epoch, last and best apart.

    python -m evaluation.finetune --task rte --checkpoint runs/mini --data-dir glue/RTE --output runs/mini-rte

As in the papers (Devlin et al. 2019, A.3; Mosbach et al. 2021): AdamW with bias correction, linear warm-up and decay,
dropout, gradients clipped to norm 1. Without `--deepspeed_config` the run is in float32 without ZeRO.
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from torch import Tensor
from tqdm import tqdm

from data_prep.cli import claim_output, run_cli, write_json
from evaluation.baselines import BASELINES, majority, ngram
from evaluation.encoder import Start, fill_model, find_start, read_encoder
from evaluation.export import export_model, whole_weights
from evaluation.features import Features, epoch_batches, gather_batch
from evaluation.predict import apply_model, predict_file
from evaluation.results import (
    RESULTS_FILE,
    best_epoch,
    detail_table,
    finish_seed,
    percent,
    seed_folder,
    seed_result_file,
    seed_table,
    summarize,
)
from evaluation.settings import check_numbers, find_task, parse_args, resolve_settings
from evaluation.task import Task
from pretrain.engine import initialize_engine
from pretrain.layout import init_layout
from pretrain.schedule import learning_rate


def main(argv: list[str] | None = None) -> None:
    """Check everything, claim the output folder, run the seeds that are not finished, print the table."""
    args = parse_args(argv)
    check_numbers(args)
    if args.predict:
        predict_file(args.output, args.predict, args.seeds)
        return
    args.seeds = args.seeds or [0, 1, 2]
    task = find_task(args)
    train = task.read(args.data_dir / task.train_file, True)[: args.max_train_examples]
    dev = task.read(args.data_dir / task.dev_file, True)
    start = None if args.checkpoint in BASELINES else find_start(args.checkpoint, args.model, args.vocab)
    settings = resolve_settings(args, task, start, train, dev)
    todo = [seed for seed in args.seeds if not seed_result_file(args.output, seed).exists()]
    done_file = seed_result_file(Path(), todo[0] if todo else args.seeds[0])
    claim_output(args.output, settings, "finetune", str(done_file))
    if len(todo) < len(args.seeds):
        print(f"finished before and kept: seed {', '.join(str(seed) for seed in args.seeds if seed not in todo)}")
    if start is None:
        run_baseline(args.checkpoint, task, train, dev, todo, args.output)
    elif todo:
        fine_tune(task, start, train, dev, todo, settings, args.output, args.keep_weights)
    kind = args.checkpoint if start is None else "random" if start.weights is None else "pretrained"
    head = {"task": task.name, "start": kind, "checkpoint": args.checkpoint, "metrics": list(task.metrics)}
    head |= {"data": str(args.data_dir), "dev_sha256": settings["dev"]["sha256"], "model": settings.get("model")}
    head |= {"num_train": len(train), "num_dev": len(dev)}
    results = summarize(args.output, head)
    write_json(args.output / RESULTS_FILE, results)
    print(
        f"{task.name} from {args.checkpoint}: {len(train):,} training and {len(dev):,} dev examples, scores in percent"
    )
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


def fine_tune(
    task: Task, start: Start, train: Sequence, dev: Sequence, seeds: list[int], settings: dict, output: Path, keep: str
) -> None:
    """Encode the examples once, then run one seed after another and write each one's folder."""
    layout, length = init_layout(), settings["max_seq_length"]
    encoder = read_encoder(start)
    train, dev = (
        Split(examples, task.encode(start.tokenizer, examples, length, f"{name} examples"))
        for examples, name in ((train, "training"), (dev, "dev"))
    )
    print(f"training examples: {train.features.note}; dev examples: {dev.features.note}")
    for seed in seeds:
        model = task.head(start.config, layout, task.num_outputs)
        drawn = fill_model(model, encoder, seed)
        if encoder and seed == seeds[0]:
            print(f"not in the checkpoint, so drawn from each seed: {', '.join(drawn)}")
        engine, optimizer = initialize_engine(model, settings["deepspeed_config"], layout)
        folder = seed_folder(output, seed)
        folder.mkdir(exist_ok=True)
        with open(folder / "metrics.jsonl", "w", encoding="utf-8", buffering=1) as file:
            epochs, predictions, weights = train_one_seed(
                engine, optimizer, task, train, dev, settings, seed, keep, file
            )
        if weights:
            export_model(folder / "model", weights, task, start.config, start.tokenizer, length)
        finish_seed(output, seed, task, epochs, dev.examples, predictions)
        engine.destroy()
    layout.close()


def train_one_seed(
    engine, optimizer, task: Task, train: Split, dev: Split, settings: dict, seed: int, keep: str, log: IO[str]
) -> tuple[list[dict], object, dict[str, Tensor]]:
    """THE loop: every epoch's row (losses, dev scores, speed), the dev predictions after the last one, and the
    weights of the epoch that is kept ("last", "best"; {} for "none").
    """
    num_steps = settings["epochs"] * -(-len(train.features) // settings["batch_size"])  # an example may be many windows
    block = settings["deepspeed_config"]["scheduler"]
    schedule = block | {"params": block["params"] | {"total_num_steps": num_steps}}
    peak_lr = settings["deepspeed_config"]["optimizer"]["params"]["lr"]
    epochs, step, weights = [], 0, {}
    bar = tqdm(total=num_steps, desc=f"{task.name} seed {seed}", unit="step", dynamic_ncols=True)
    for epoch in range(1, settings["epochs"] + 1):
        began, losses = time.perf_counter(), []
        for indices in epoch_batches(len(train.features), settings["batch_size"], seed, epoch):
            rate = learning_rate(schedule, peak_lr, step)
            losses.append(train_step(engine, optimizer, task, train.features, indices, rate, seed, step))
            write_row(log, kind="train", step=step + 1, loss=losses[-1], learning_rate=rate)
            step += 1
            bar.update()
        examples_per_s = len(train.examples) / (time.perf_counter() - began)
        dev_loss, logits = apply_model(engine.module, task, dev.features, engine.mpu.device)
        predictions = task.decode(dev.examples, dev.features, logits)
        scores = task.score(dev.examples, predictions)
        epochs.append({"epoch": epoch, "step": step, "train_loss": float(np.mean(losses)), "dev_loss": dev_loss,
                       "scores": scores, "examples_per_s": examples_per_s})  # fmt: skip
        write_row(log, kind="dev", **epochs[-1])
        bar.set_postfix({name: percent(scores[name]) for name in task.metrics})
        num_since_best = epoch - best_epoch(epochs, task.metrics[0])
        if keep == "best" and num_since_best == 0:
            weights = whole_weights(engine.module)
        if num_since_best == settings["patience"]:
            break
    bar.close()
    return epochs, predictions, whole_weights(engine.module) if keep == "last" else weights


def train_step(
    engine, optimizer, task: Task, train: Features, indices: np.ndarray, rate: float, seed: int, step: int
) -> float:
    """One update on the sequences `indices` [B]: their mean loss. Raises FloatingPointError if it is not finite."""
    layout = engine.mpu
    for group in optimizer.param_groups:
        group["lr"] = rate
    sequences, labels = gather_batch(train, indices)
    logits = engine(sequences.to(layout.device), (seed, step, layout.dp_rank))
    loss = task.loss(logits, labels.to(layout.device), sequences).mean()
    engine.backward(loss)
    engine.step()
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"seed {seed}, step {step + 1}: the loss is {loss.item()}; lower --learning-rate")
    return loss.item()


def write_row(log: IO[str], **row) -> None:
    """One row of metrics.jsonl."""
    log.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    run_cli(main)
