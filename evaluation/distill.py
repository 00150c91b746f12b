"""Distillation (Hinton, Vinyals and Dean 2015): a small model learns what a larger one, fine-tuned on the same task,
answers to the training examples, beside their labels; for tasks with a label or a score a row.

    loss = (1 - a) * the task's loss + a * T^2 * KL(softmax(teacher / T) || softmax(student / T))

T^2 keeps the gradients of the second term as large as those of the first, whatever T is (section 2). For a score it is
the squared error to the teacher's. The teacher's logits are computed once, the mean over the seeds that it has kept.
They travel beside the labels, so the loop knows nothing of them.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.text.tokenizer import Tokenizer
from evaluation.predict import find_seeds, seed_weights
from evaluation.tasks.by_name import restore_task
from evaluation.tasks.features import Features
from evaluation.tasks.heads import BertForSequenceClassification
from evaluation.tasks.task import Task
from pretrain.layers import Sequences
from pretrain.weights import Weights


def find_teacher(run: Path, task: Task, tokenizer: Tokenizer, max_seq_length: int) -> list[Weights]:
    """The kept weights of a finished run. Raises ValueError for one of another task or another vocabulary, and for a
    model that cannot read sequences so long.
    """
    settings, seeds = find_seeds(run)
    if task.head is not BertForSequenceClassification:
        raise ValueError(
            f"--teacher: {task.name} has no label or score a row, which is what is distilled; leave it out"
        )
    taught = restore_task(settings["task"], {})
    if (taught.name, taught.labels) != (task.name, task.labels):
        raise ValueError(
            f"--teacher {run} has learnt {taught.name} ({', '.join(taught.labels) or 'a score'}), this is {task.name} "
            f"({', '.join(task.labels) or 'a score'}); name a run of the same task"
        )
    if settings["vocab"]["sha256"] != tokenizer.sha256:
        raise ValueError(
            f"--teacher {run} has another vocabulary, {settings['vocab']['file']} with sha256 "
            f"{settings['vocab']['sha256'][:12]}...; name a run of a model with {tokenizer.path}"
        )
    weights = seed_weights(run, seeds)
    longest = weights[0].config.max_position_embeddings
    if longest < max_seq_length:
        raise ValueError(f"--teacher {run} has positions for {longest} tokens; lower --max-seq-length to that")
    return weights


def distill(
    task: Task, features: Features, teacher: list[Tensor], weight: float, temperature: float
) -> tuple[Task, Features]:
    """The task with the loss above, and features whose labels are [N, 1+L] float32: the label, the teacher's logits."""
    labels = np.column_stack([features.labels, torch.stack(teacher).numpy()]).astype(np.float32)
    loss = partial(distilled_loss, task, weight, temperature)
    return replace(task, loss=loss), replace(features, labels=labels)


def distilled_loss(
    task: Task, weight: float, temperature: float, logits: Tensor, labels: Tensor, sequences: Sequences
) -> Tensor:
    """[B] The loss above. logits: [B, L], labels: [B, 1+L]. For labels [B], which dev has, the task's own loss."""
    if labels.dim() == 1:
        return task.loss(logits, labels, sequences)
    hard, teacher = labels[:, 0], labels[:, 1:]
    if task.labels:
        hard = hard.long()
        log_p, log_q = F.log_softmax(logits / temperature, 1), F.log_softmax(teacher / temperature, 1)
        soft = temperature**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
    else:
        soft = F.mse_loss(logits, teacher, reduction="none").squeeze(1)
    return (1 - weight) * task.loss(logits, hard, sequences) + weight * soft
