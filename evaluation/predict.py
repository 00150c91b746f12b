"""A fine-tuned model over a file: logits without dropout, and `--predict`: answers for a file without labels.

RUN/seed_0/model/                 the weights of a seed, a Hugging Face folder (`evaluation.export`)
RUN/predictions/NAME/             what the task writes for the file NAME, and for GLUE the benchmark's own file
RUN/predictions/NAME/predict.json which file, by its sha256, and which seed
"""

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.files import FINISHED_FILE, RUN_FILE, claim_output, mark_finished, read_json
from data_prep.text.tokenizer import load_tokenizer
from evaluation.options import sha256_of
from evaluation.run_folder import RESULTS_FILE, percent, scores_of, seed_folder
from evaluation.tasks.by_name import restore_task
from evaluation.tasks.features import Features, gather_batch, split_logits
from evaluation.tasks.glue import write_submission
from evaluation.tasks.task import Task
from pretrain.layout import Layout, init_lone_layout
from pretrain.model import load_weights
from pretrain.weights import Weights, open_weights

EVAL_BATCH_SIZE = 64


@torch.no_grad()
def apply_model(
    module: nn.Module, task: Task | None, features: Features, layout: Layout
) -> tuple[float | None, list[Tensor]]:
    """Mean of the task's loss over all that has a label (None without labels), and what the module gives for each
    sequence, in their order; collective. The ranks take the batches in turn, all get the same answer.
    """
    order = np.argsort(features.lengths, kind="stable")  # neighbours of one length: attention pads less
    batches = np.split(order, range(EVAL_BATCH_SIZE, len(order), EVAL_BATCH_SIZE))
    num_rounds = -(-len(batches) // layout.dp_size)
    answers = []  # (losses, logits) of this rank's batches
    for number in range(layout.dp_rank, num_rounds * layout.dp_size, layout.dp_size):
        is_own = number < len(batches)
        # Under ZeRO 3 ranks have to go forward together: one that has no batch in the last round takes the shortest.
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


COMMAND = "evaluation.predict"


def mean_logits(weights: list[Weights], task: Task, features: Features, layout: Layout) -> list[Tensor]:
    """The logits of each sequence, the mean over fine-tuned models; collective."""
    sums: list[Tensor] = []
    for one in weights:
        model = task.head(one.config, layout, task.num_outputs)
        load_weights(model, one)
        _, logits = apply_model(model.to(layout.device), None, replace(features, labels=None), layout)
        sums = [total + new for total, new in zip(sums, logits, strict=True)] if sums else logits
    return [total / len(weights) for total in sums]


def predict_file(run: Path, file: Path, seeds: list[int] | None) -> None:
    """Write the answers for a file whose labels, if it has any, are not looked at. Several seeds answer together: an
    ensemble, whose logits are the mean of theirs. Without any the one with the best dev score answers. Scores and
    thresholds are those of the epoch whose weights were kept.

    Raises ValueError for a folder without a fine-tuned model, for a file that is not the task's, and where answers to
    another file of the same name, or of other seeds, stand already.
    """
    settings, rows = find_seeds(run)
    epoch = settings.get("keep_weights")
    if epoch is None:  # made before run.json said so
        raise ValueError(
            f"{run}/run.json does not say which epoch's weights were kept; add the run's --keep-weights to it: "
            '"keep_weights": "last" or "best"'
        )
    rows = _answering(run, rows, seeds, epoch)
    task = restore_task(settings["task"], _mean_scores(rows, epoch))
    examples = task.read(file, False)
    weights = seed_weights(run, rows)
    tokenizer = load_tokenizer(weights[0].home / settings["vocab"]["file"])
    output, answering = run / "predictions" / file.name, ", ".join(str(row["seed"]) for row in rows)
    identity = {"file": file.name, "sha256": sha256_of(file), "seed": answering, "epoch": epoch}
    identity["weights"] = [one.identity() for one in weights]
    if (output / FINISHED_FILE).exists() and (held := read_json(output / RUN_FILE)) != {"command": COMMAND} | identity:
        other = ", ".join(key for key in identity if held.get(key) != identity[key])
        raise ValueError(
            f"{output} holds the answers to another file of this name, or of other seeds ({other} differs); rename "
            "that folder to keep them, or remove it"
        )
    if claim_output(output, COMMAND, identity) == "done":
        return
    layout = init_lone_layout()
    features = task.encode(tokenizer, examples, settings["max_seq_length"], file.name)
    predictions = task.decode(examples, features, mean_logits(weights, task, features, layout))
    task.write(output, examples, predictions)
    if note := write_submission(output, task, file.stem, predictions):
        print(note)
    layout.close()
    mark_finished(output, num_examples=len(examples))
    print(f"{file}: {len(examples):,} examples ({features.note}), answered by seed {answering}: {output}")


def _mean_scores(rows: list[dict], epoch: str) -> dict[str, float | None]:
    """Of the seeds' "last" or "best" epochs: an ensemble's threshold is the mean of theirs."""
    scores = [scores_of(row, epoch) for row in rows]
    return {
        name: None if None in (values := [score.get(name) for score in scores]) else fmean(values) for name in scores[0]
    }


def find_seeds(run: Path) -> tuple[dict, list[dict]]:
    """run.json of a run, and the results of the seeds that kept their weights; ValueError if there is none."""
    for name in ("run.json", RESULTS_FILE):
        if not (run / name).is_file():
            raise ValueError(f"{run} has no {name}; the --output folder of a finished fine-tuning is due")
    rows = read_json(run / RESULTS_FILE)["seeds"]
    kept = [row for row in rows if (seed_folder(run, row["seed"]) / "model/model.safetensors").is_file()]
    if not kept:
        raise ValueError(f"{run}: no seed has kept its weights; fine-tune into another folder with --keep-weights last")
    return read_json(run / "run.json"), kept


def seed_weights(run: Path, rows: list[dict]) -> list[Weights]:
    """The kept weights of these seeds."""
    return [open_weights(seed_folder(run, row["seed"]) / "model") for row in rows]


def _answering(run: Path, kept: list[dict], seeds: list[int] | None, epoch: str) -> list[dict]:
    """The seeds asked for, or the one with the best score at its "last" or "best" epoch; scores are printed."""
    rows = {row["seed"]: row for row in kept}
    if absent := [seed for seed in seeds or [] if seed not in rows]:
        raise ValueError(
            f"--seeds {absent[0]}: {run} has the weights of seed {', '.join(map(str, rows))}; name one of them"
        )
    metric = read_json(run / RESULTS_FILE)["metrics"][0]
    scores = {number: scores_of(row, epoch)[metric] for number, row in rows.items()}
    if not seeds:
        seeds = [max(rows, key=lambda number: -np.inf if scores[number] is None else scores[number])]
    for seed in seeds:
        print(f"seed {seed}: dev {metric} {percent(scores[seed])} at its {epoch} epoch")
    return [rows[seed] for seed in seeds]
