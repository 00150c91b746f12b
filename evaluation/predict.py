"""A fine-tuned model over a file: logits without dropout, and `--predict`: answers for a file without labels.

RUN/seed_0/model/                 the weights of a seed, a Hugging Face folder (`evaluation.export`)
RUN/predictions/NAME/             what the task writes for the file NAME, and for GLUE the benchmark's own file
RUN/predictions/NAME/predict.json which file and which seed
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.cli import claim_output, read_json, write_json
from data_prep.tokenizer import load_tokenizer
from evaluation.features import Features, gather_batch, split_logits
from evaluation.glue import write_submission
from evaluation.results import RESULTS_FILE, percent, scores_of, seed_folder
from evaluation.settings import restore_task, sha256_of
from evaluation.task import Task
from pretrain.layout import init_layout
from pretrain.model import load_weights
from pretrain.weights import open_weights

EVAL_BATCH_SIZE = 64


@torch.no_grad()
def apply_model(
    module: nn.Module, task: Task | None, features: Features, device: torch.device
) -> tuple[float | None, list[Tensor]]:
    """Mean of the task's loss over all that has a label (None without labels), and what the module gives for each
    sequence, in their order.
    """
    order = np.argsort(features.lengths, kind="stable")  # neighbours of one length: attention pads less
    losses, logits = [], []
    for indices in np.split(order, range(EVAL_BATCH_SIZE, len(order), EVAL_BATCH_SIZE)):
        sequences, labels = gather_batch(features, indices)
        outputs = module(sequences.to(device)).cpu()
        if labels is not None:
            losses.append(task.loss(outputs, labels, sequences))
        logits += split_logits(outputs, sequences)
    loss = torch.cat(losses).mean().item() if losses else None
    return loss, [logits[place] for place in np.argsort(order)]


def predict_file(run: Path, file: Path, seed: int | None) -> None:
    """Write the answers of one seed's model for a file whose labels, if it has any, are not looked at. Without a seed
    the one with the best dev score is taken.

    Raises ValueError for a folder without a fine-tuned model, and for a file that is not the task's.
    """
    settings, row = _find_seed(run, seed)
    task = restore_task(settings["task"], scores_of(row, "last"))
    examples = task.read(file, False)
    folder = seed_folder(run, row["seed"]) / "model"
    weights = open_weights(folder)
    tokenizer = load_tokenizer(folder / settings["vocab"]["file"])
    output = run / "predictions" / file.name
    identity = {"file": str(file), "sha256": sha256_of(file), "seed": row["seed"], "weights": weights.identity()}
    if claim_output(output, identity, "predict", "done.json") == "done":
        return
    layout = init_layout()
    model = task.head(weights.config, layout, task.num_outputs)
    load_weights(model, weights)
    model.to(layout.device)
    features = task.encode(tokenizer, examples, settings["max_seq_length"], file.name)
    _, logits = apply_model(model, task, features, layout.device)
    predictions = task.decode(examples, features, logits)
    task.write(output, examples, predictions)
    if note := write_submission(output, task, file.stem, predictions):
        print(note)
    layout.close()
    write_json(output / "done.json", {"num_examples": len(examples)})
    print(f"{file}: {len(examples):,} examples ({features.note}), answered by seed {row['seed']}: {output}")


def _find_seed(run: Path, seed: int | None) -> tuple[dict, dict]:
    """finetune.json of a run, and the result of the seed asked for, or of the best one that kept its weights."""
    for name in ("finetune.json", RESULTS_FILE):
        if not (run / name).is_file():
            raise ValueError(f"{run} has no {name}; --predict needs the --output folder of a finished fine-tuning")
    settings, results = read_json(run / "finetune.json"), read_json(run / RESULTS_FILE)
    rows = {row["seed"]: row for row in results["seeds"]}
    kept = [number for number in rows if (seed_folder(run, number) / "model/model.safetensors").is_file()]
    if not kept:
        raise ValueError(f"{run}: no seed has kept its weights; fine-tune into another folder with --keep-weights last")
    if seed is not None and seed not in kept:
        raise ValueError(f"--seeds {seed}: {run} has the weights of seed {', '.join(map(str, kept))}; name one of them")
    metric = results["metrics"][0]
    scores = {number: scores_of(rows[number], "last")[metric] for number in kept}
    if seed is None:
        seed = max(kept, key=lambda number: -np.inf if scores[number] is None else scores[number])
    print(f"seed {seed}: dev {metric} {percent(scores[seed])} after the last epoch")
    return settings, rows[seed]
