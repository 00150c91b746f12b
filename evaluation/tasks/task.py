"""A task as the one loop knows it: five plain functions between a file and its scores.

    read     file            -> examples      evaluation.tasks.classification, .ranking, .squad, .ner
    encode   examples        -> Features      token ids, and what is to be learnt
    head     configuration   -> module        evaluation.tasks.heads: Sequences -> logits
    decode   logits          -> predictions   whatever the task answers with
    score    predictions     -> {name: value}

Examples and predictions are the task's own; the loop only hands them on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from data_prep.text.tokenizer import Tokenizer
from evaluation.tasks.features import Features
from pretrain.layers import Sequences
from pretrain.layout import Layout
from pretrain.model_config import ModelConfig

Scores = dict[str, float | None]  # None where a score is undefined


@dataclass(frozen=True)
class Task:
    """`metrics` are those of the scores that the table shows, the first one picks the best epoch; further scores are
    shown in a table of their own. `labels` are the names of the outputs, for export. `settings` is all that makes this
    task, as JSON: `evaluation.options.restore_task` makes it again.
    """

    name: str
    metrics: tuple[str, ...]
    train_file: str
    dev_file: str
    labels: tuple[str, ...]
    num_outputs: int
    max_seq_length: int  # unless the user says otherwise
    settings: dict
    read: Callable[[Path, bool], list]  # (file, is it labelled); ValueError with file and line
    encode: Callable[[Tokenizer, Sequence, int, str], Features]  # (..., max_seq_length, name for the progress bar)
    features: type[Features]  # what it gives
    head: Callable[[ModelConfig, Layout, int], nn.Module]  # (..., num_outputs)
    loss: Callable[[Tensor, Tensor, Sequences], Tensor]  # (logits, labels, ...) -> one loss each, not reduced
    decode: Callable[[Sequence, Features, list[Tensor]], object]  # logits: [L] or [S, L] for each sequence
    score: Callable[[Sequence, object], Scores]
    write: Callable[[Path, Sequence, object], None]  # the predictions' files into a folder
