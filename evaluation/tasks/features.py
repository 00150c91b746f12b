"""Examples as token ids, and batches of them without padding.

A sequence is [CLS] A [SEP], or [CLS] A [SEP] B [SEP] with B and its [SEP] in segment 1 (Devlin et al. 2019, section 3).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from data_prep.text.tokenizer import Tokenizer
from pretrain.data import pack_sequences
from pretrain.layers import Sequences


@dataclass(frozen=True)
class Features:
    """N encoded sequences, concatenated to T tokens, and their labels, which are None if the file has none.

    Labels are class indices (int64) or scores (float32) [N], the first and last token of an answer, counted within the
    sequence [N, 2], or a class index for each token [T], -100 for none.
    """

    token_ids: np.ndarray  # [T] int64
    sequence_start: np.ndarray  # [N+1] int64, in tokens
    segment_b_start: np.ndarray  # [N] int64, within the sequence; its length if there is no second segment
    labels: np.ndarray | None
    note: str  # for the user: how many texts were cut, how many windows there are

    def __len__(self) -> int:
        return len(self.segment_b_start)

    @property
    def lengths(self) -> np.ndarray:
        """[N] Number of tokens of each sequence."""
        return np.diff(self.sequence_start)

    def token_index(self, indices: np.ndarray) -> np.ndarray:
        """The index in `token_ids` of each token of the sequences `indices` [B]."""
        bounds = zip(self.sequence_start[indices], self.sequence_start[indices + 1], strict=True)
        return np.concatenate([np.arange(start, stop) for start, stop in bounds])

    def labels_of(self, indices: np.ndarray) -> np.ndarray | None:
        """The labels of the sequences `indices` [B]: [B], [B, 2] or those of their tokens."""
        if self.labels is None:
            return None
        # T is larger than N, since each sequence has at least [CLS] and [SEP].
        per_token = len(self.labels) == len(self.token_ids)
        return self.labels[self.token_index(indices) if per_token else indices]

    def num_targets(self, indices: np.ndarray) -> int:
        """The number of labels of the sequences `indices` [B], by which their loss is divided."""
        labels = self.labels_of(indices)
        return len(indices) if len(labels) == len(indices) else int((labels != -100).sum())


def progress(examples: Sequence, name: str) -> Iterable:
    """The examples one by one, with a progress bar that disappears at the end; without one if `name` is ""."""
    return tqdm(examples, f"encoding {name}", unit="example", mininterval=0.5, leave=False, disable=not name)


def encode_examples(tokenizer: Tokenizer, examples: Sequence, seq_length: int, name: str) -> Features:
    """Encode `evaluation.tasks.classification.Example`s, cut to `seq_length` tokens. `name` labels the progress bar.
    The note counts the examples that were cut and those with a text without tokens.
    """
    sequences, segment_b_start, num_truncated, num_empty = [], [], 0, 0
    for example in progress(examples, name):
        is_pair = example.text_pair is not None
        first = tokenizer.encode(example.text)
        second = tokenizer.encode(example.text_pair) if is_pair else []
        if not first or (is_pair and not second):
            num_empty += 1
        budget = seq_length - (3 if is_pair else 2)
        if len(first) + len(second) > budget:
            num_truncated += 1
            first, second = truncate_pair(first, second, budget)
        ids = [tokenizer.cls_id, *first, tokenizer.sep_id]
        segment_b_start.append(len(ids))
        sequences.append(np.array([*ids, *second, tokenizer.sep_id] if is_pair else ids))
    labels = [example.label for example in examples]
    dtype = np.float32 if isinstance(labels[0], float) else np.int64
    return Features(
        token_ids=np.concatenate(sequences),
        sequence_start=np.cumsum([0, *map(len, sequences)]),
        segment_b_start=np.array(segment_b_start),
        labels=None if labels[0] is None else np.array(labels, dtype),
        note=f"{num_truncated:,} of {len(examples):,} cut to {seq_length} tokens"
        + (f", {num_empty:,} with an empty text" if num_empty else ""),
    )


def truncate_pair(first: list[int], second: list[int], budget: int) -> tuple[list[int], list[int]]:
    """Cut a pair to `budget` tokens. The result is that of the loop of `_truncate_seq_pair` in google-research/bert's
    run_classifier.py, which removes one token at a time from the end of the longer text, or of the second on a tie.
    """
    num_first = min(len(first), max(budget - len(second), (budget + 1) // 2))
    return first[:num_first], second[: budget - num_first]


def gather_batch(features: Features, indices: np.ndarray) -> tuple[Sequences, torch.Tensor | None]:
    """The sequences `indices` [B] as one batch without padding, and their labels (see `Features.labels_of`)."""
    token_ids, labels = features.token_ids[features.token_index(indices)], features.labels_of(indices)
    sequences = pack_sequences(token_ids, features.lengths[indices], features.segment_b_start[indices])
    return sequences, None if labels is None else torch.from_numpy(labels)


def split_logits(logits: torch.Tensor, lengths: np.ndarray) -> list[torch.Tensor]:
    """The logits of each sequence of a batch: [L] each from [B, L], or [S, L] each from [T, L]. lengths: [B]."""
    return list(logits) if len(logits) == len(lengths) else list(logits.split(lengths.tolist()))


def epoch_batches(num_sequences: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Shuffled batches of indices, a function of (seed, epoch); the last one may be smaller."""
    order = np.random.default_rng([seed, epoch]).permutation(num_sequences)
    return np.split(order, range(batch_size, num_sequences, batch_size))
