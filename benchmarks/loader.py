"""The loader alone: how many sequences per second one core reads from shards into micro-batches, with stored and with
dynamic masks, and what share of a training step that would take without overlap.

    python -m benchmarks.loader --data SHARDS --model mini

A training run reads the next step in a background thread, so its loop waits for less than this.
"""

import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import parser, report
from data_prep.cli import run_cli
from data_prep.shards import Shards
from pretrain.data import make_batch, read_records, rule_of_shards, samples_at
from pretrain.layout import init_layout
from pretrain.model import BertForPreTraining, init_weights
from pretrain.model_config import PRESETS, load_model_config

STEP_SAMPLES = 8192  # read per round, in micro-batches


def rates(shards: Shards, micro_batch: int, repeats: int) -> list[dict]:
    """Sequences per second of one core by processor time, stored and dynamic masks in turn."""
    rule = rule_of_shards(shards)
    samples = samples_at(0, 0, STEP_SAMPLES, shards.num_sequences)
    parts = np.split(samples, STEP_SAMPLES // micro_batch)
    epochs = np.ones(micro_batch, np.int64)

    def stored() -> None:
        for part in parts:
            make_batch(read_records(shards, part))

    def dynamic() -> None:
        for part in parts:
            make_batch(read_records(shards, part, epochs, rule))

    seconds: dict[str, list[float]] = {"stored masks": [], "dynamic masks": []}
    for turn in range(repeats + 1):
        for times, read in zip(seconds.values(), (stored, dynamic), strict=True):
            start = time.process_time()
            read()
            if turn:
                times.append(time.process_time() - start)
    return [{"what": name, "sequences/s": STEP_SAMPLES / float(np.median(times))} for name, times in seconds.items()]


def step_share(shards: Shards, model: str, micro_batch: int, repeats: int) -> list[dict]:
    """Time to read a micro-batch, compared with its forward and backward pass, on all cores of this process."""
    config = load_model_config(model, shards.manifest["vocab"]["size"])
    module = BertForPreTraining(config, init_layout())
    init_weights(module, seed=0)
    rule = rule_of_shards(shards)
    times: dict[str, list[float]] = {"forward and backward": [], "stored masks": [], "dynamic masks": []}
    for turn in range(repeats + 1):
        samples = samples_at(0, turn * micro_batch, micro_batch, shards.num_sequences)
        marks = [time.perf_counter()]
        batch = make_batch(read_records(shards, samples))
        marks.append(time.perf_counter())
        make_batch(read_records(shards, samples, np.ones(micro_batch, np.int64), rule))
        marks.append(time.perf_counter())
        mlm_loss, _, pair_loss, _ = module(batch, (0, turn, 0, 0))
        (mlm_loss.mean() + pair_loss.mean()).backward()
        marks.append(time.perf_counter())
        if turn:
            stored, dynamic, step = np.diff(marks)
            for name, value in zip(times, (step, stored, dynamic), strict=True):
                times[name].append(value)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    step = medians["forward and backward"]
    return [{"what": n, "median ms": 1e3 * s, "share of the step, %": 100 * s / step} for n, s in medians.items()]


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--data", required=True, type=Path, help="folder of masked shards made by data_prep.build")
    options.add_argument("--model", default="mini", choices=PRESETS, help="whose step to compare with (default mini)")
    options.add_argument("--micro-batch", type=int, default=32, help="sequences at once (default 32)")
    args = options.parse_args(argv)
    if STEP_SAMPLES % args.micro_batch:
        raise ValueError(f"--micro-batch {args.micro_batch} does not divide {STEP_SAMPLES}")
    shards = Shards(args.data)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tables = {"One core": rates(shards, args.micro_batch, args.repeats)}
    torch.set_num_threads(threads)
    title = f"A micro-batch of {args.micro_batch}, {args.model}, {threads} threads"
    report("loader", {**tables, title: step_share(shards, args.model, args.micro_batch, args.repeats)}, args.save)


if __name__ == "__main__":
    run_cli(main)
