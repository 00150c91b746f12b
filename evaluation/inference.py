"""Applies a model to features, without dropout, and finds the weights that a run kept in RUN/seed_0/model/."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.files import RUN_FILE, read_json
from evaluation.run_folder import RESULTS_FILE, seed_folder
from evaluation.tasks.features import Features, gather_batch, split_logits
from evaluation.tasks.task import Task
from pretrain.layout import Layout
from pretrain.model import load_weights
from pretrain.weights import Weights, open_weights

EVAL_BATCH_SIZE = 64


@torch.no_grad()
def apply_model(
    module: nn.Module, task: Task | None, features: Features, layout: Layout
) -> tuple[float | None, list[Tensor]]:
    """The task's loss, averaged over all labels (None without labels), and the module's output for each sequence.

    Collective: the batches are distributed over the ranks, and every rank gets the whole result.
    """
    order = np.argsort(features.lengths, kind="stable")  # batches of similar lengths: attention pads less
    batches = np.split(order, range(EVAL_BATCH_SIZE, len(order), EVAL_BATCH_SIZE))
    num_rounds = -(-len(batches) // layout.dp_size)
    answers = []  # (losses, logits) of this rank's batches
    for number in range(layout.dp_rank, num_rounds * layout.dp_size, layout.dp_size):
        is_own = number < len(batches)
        # Under ZeRO 3 all ranks must run forward together: a rank without a batch in the last round runs the shortest.
        sequences, labels = gather_batch(features, batches[number if is_own else 0])
        outputs = module(sequences.to(layout.device)).cpu()
        if is_own:
            answers.append((None if labels is None else task.loss(outputs, labels, sequences), outputs))
    by_rank = layout.gather(answers)
    losses, logits = [], []
    for number, indices in enumerate(batches):
        loss, outputs = by_rank[number % layout.dp_size][number // layout.dp_size]
        losses += [] if loss is None else [loss]
        logits += split_logits(outputs, features.lengths[indices])
    return torch.cat(losses).mean().item() if losses else None, [logits[place] for place in np.argsort(order)]


def mean_logits(weights: list[Weights], task: Task, features: Features, layout: Layout) -> list[Tensor]:
    """The logits of each sequence, averaged over fine-tuned models. Collective."""
    sums: list[Tensor] = []
    for one in weights:
        model = task.head(one.config, layout, task.num_outputs)
        load_weights(model, one)
        _, logits = apply_model(model.to(layout.device), None, replace(features, labels=None), layout)
        sums = [total + new for total, new in zip(sums, logits, strict=True)] if sums else logits
    return [total / len(weights) for total in sums]


def find_seeds(run: Path) -> tuple[dict, list[dict]]:
    """The run.json of a fine-tuning run, and the results of the seeds that kept weights; ValueError if none did."""
    for name in (RUN_FILE, RESULTS_FILE):
        if not (run / name).is_file():
            raise ValueError(f"{run} has no {name}; name the --output folder of a finished fine-tuning run")
    rows = read_json(run / RESULTS_FILE)["seeds"]
    kept = [row for row in rows if (seed_folder(run, row["seed"]) / "model/model.safetensors").is_file()]
    if not kept:
        raise ValueError(f"{run}: no seed has kept its weights; fine-tune into another folder with --keep-weights last")
    return read_json(run / RUN_FILE), kept


def seed_weights(run: Path, rows: list[dict]) -> list[Weights]:
    """The kept weights of these seeds."""
    return [open_weights(seed_folder(run, row["seed"]) / "model") for row in rows]
