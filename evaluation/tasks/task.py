"""What a task is: the functions between a file of examples and its scores. The fine-tuning loop knows nothing else.

    read    file                   -> examples       a list, in the order of the file
    encode  examples               -> Features       N sequences, T tokens in all, and their labels
    head    model configuration    -> module         Sequences -> logits: [B, L] per sequence or [T, L] per token
    loss    logits, labels         -> losses         one per label, not reduced: the loop takes the mean
    decode  examples, logits       -> predictions    one per example
    score   examples, predictions  -> {name: value}
    write   examples, predictions  -> files in a folder

An example may be cut into several windows; then N is larger than the number of examples, and `decode` joins the
windows again. The types of examples and predictions belong to the task: the loop only hands them from one function to
the next. To add a task, write a module with a function that returns a `Task`, and name it in
`evaluation.tasks.by_name`.
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

Scores = dict[str, float | None]  # None: the score is undefined, such as a correlation with constant predictions


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task: its name, files, outputs and seven functions.

    L is `num_outputs`. `read` raises ValueError, with file and line, for a file that does not fit the task.
    """

    name: str
    metrics: tuple[str, ...]  # the scores of the main table; the first one picks the best epoch
    train_file: str
    dev_file: str
    labels: tuple[str, ...]  # names of the L outputs, for export; empty if they have none
    num_outputs: int
    seq_length: int  # tokens per sequence, unless the user gives another number
    settings: dict  # JSON from which `evaluation.tasks.by_name.restore_task` makes the same task
    read: Callable[[Path, bool], list]  # (file, whether it has labels)
    encode: Callable[[Tokenizer, Sequence, int, str], Features]  # (.., .., seq_length, name for the progress bar)
    features: type[Features]  # the class of what `encode` returns
    head: Callable[[ModelConfig, Layout, int], nn.Module]  # (.., .., num_outputs)
    loss: Callable[[Tensor, Tensor, Sequences], Tensor]  # (logits, labels, the batch)
    decode: Callable[[Sequence, Features, list[Tensor]], object]  # logits of each sequence: [L] or [S, L]
    score: Callable[[Sequence, object], Scores]
    write: Callable[[Path, Sequence, object], None]  # (folder, .., ..)
