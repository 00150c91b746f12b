"""Distillation (Hinton, Vinyals and Dean 2015): a small model learns from a larger one that was fine-tuned on the same
task, in addition to the labels of the training examples. For tasks with one label or score per example.

    loss = (1 - a) * the task's loss + a * T^2 * KL(softmax(teacher / T) || softmax(student / T))

T^2 keeps the gradients of the second term as large as those of the first for any T (section 2). For a score, the second
term is a times the squared distance to the teacher's score. The teacher's logits are averaged over its kept seeds. They
are computed once and stored with the labels, so the fine-tuning loop does not have to know about them.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.text.tokenizer import Tokenizer
from evaluation.inference import find_seeds, seed_weights
from evaluation.tasks.by_name import restore_task
from evaluation.tasks.features import Features
from evaluation.tasks.heads import BertForSequenceClassification
from evaluation.tasks.task import Task
from pretrain.layers import Sequences
from pretrain.weights import Weights


def find_teacher(run: Path, task: Task, tokenizer: Tokenizer, seq_length: int) -> list[Weights]:
    """The kept weights of a run. Raises ValueError for another task or vocabulary, or for too few positions."""
    settings, seeds = find_seeds(run)
    if task.head is not BertForSequenceClassification:
        raise ValueError(f"--teacher: {task.name} does not have one label or score per example; leave it out")
    taught = restore_task(settings["task"], {})
    if (taught.name, taught.labels) != (task.name, task.labels):
        raise ValueError(
            f"--teacher {run} was trained on {taught.name} ({', '.join(taught.labels) or 'a score'}), this is "
            f"{task.name} ({', '.join(task.labels) or 'a score'}); name a run of the same task"
        )
    if settings["vocab"]["sha256"] != tokenizer.sha256:
        raise ValueError(
            f"--teacher {run} has another vocabulary, {settings['vocab']['file']} with sha256 "
            f"{settings['vocab']['sha256'][:12]}...; name a run of a model with {tokenizer.path}"
        )
    weights = seed_weights(run, seeds)
    longest = weights[0].config.max_position_embeddings
    if longest < seq_length:
        raise ValueError(f"--teacher {run} has positions for {longest} tokens; lower --seq-length to that")
    return weights


def distill(
    task: Task, features: Features, teacher: list[Tensor], weight: float, temperature: float
) -> tuple[Task, Features]:
    """The task with the loss above, and features with labels [N, 1+L] float32: the label and the teacher's logits."""
    labels = np.column_stack([features.labels, torch.stack(teacher).numpy()]).astype(np.float32)
    loss = partial(distilled_loss, task, weight, temperature)
    return replace(task, loss=loss), replace(features, labels=labels)


def distilled_loss(
    task: Task, weight: float, temperature: float, logits: Tensor, labels: Tensor, sequences: Sequences
) -> Tensor:
    """The loss above, [B], from logits [B, L] and labels [B, 1+L]; for the dev set's labels [B], the task's loss."""
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
