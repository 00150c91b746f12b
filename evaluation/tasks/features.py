"""Examples -> token ids -> batches without padding: what the encoder reads of a sentence or a pair.

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
    """N encoded sequences, one behind the other, and what is to be learnt of them.

    `labels` is int64 classes or float32 scores [N], first and last token of an answer inside the sequence [N, 2], or a
    class for each token [T] (-100: none); None if the file has no labels.
    """

    token_ids: np.ndarray  # [T] int64
    sequence_start: np.ndarray  # [N+1] int64, in tokens
    segment_b_start: np.ndarray  # [N] int64, inside the sequence; its length where there is no second segment
    labels: np.ndarray | None
    note: str  # what was cut or windowed, for the user

    def __len__(self) -> int:
        return len(self.segment_b_start)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, [N]."""
        return np.diff(self.sequence_start)

    def places(self, indices: np.ndarray) -> np.ndarray:
        """Where the tokens of the sequences `indices` [B] stand in token_ids."""
        bounds = zip(self.sequence_start[indices], self.sequence_start[indices + 1], strict=True)
        return np.concatenate([np.arange(start, stop) for start, stop in bounds])

    def labels_of(self, indices: np.ndarray) -> np.ndarray | None:
        """The labels of the sequences `indices` [B]: [B], [B, 2] or those of their tokens."""
        if self.labels is None:
            return None
        # A label a token or a label a sequence: there are always more tokens, each sequence has [CLS] and [SEP].
        return self.labels[self.places(indices) if len(self.labels) == len(self.token_ids) else indices]

    def num_targets(self, indices: np.ndarray) -> int:
        """How many things with a label the sequences `indices` [B] have: each of them, or their tokens with a label."""
        labels = self.labels_of(indices)
        return len(indices) if len(labels) == len(indices) else int((labels != -100).sum())


def progress(examples: Sequence, name: str) -> Iterable:
    """The examples one by one, with a progress bar that goes away; without one if `name` is ""."""
    return tqdm(examples, f"encoding {name}", unit="example", mininterval=0.5, leave=False, disable=not name)


def encode_examples(tokenizer: Tokenizer, examples: Sequence, max_seq_length: int, name: str) -> Features:
    """Encode `evaluation.tasks.classification.Example`s; those longer than `max_seq_length` tokens lose the
    ends of their texts. `name` labels the progress bar. Texts without a token are counted in the note.
    """
    sequences, segment_b_start, num_truncated, num_empty = [], [], 0, 0
    for example in progress(examples, name):
        first = tokenizer.encode(example.text)
        second = tokenizer.encode(example.text_pair) if example.text_pair is not None else []
        budget = max_seq_length - (2 if example.text_pair is None else 3)
        num_truncated += len(first) + len(second) > budget
        num_empty += not first or (example.text_pair is not None and not second)
        first, second = truncate_pair(first, second, budget)
        ids = [tokenizer.cls_id, *first, tokenizer.sep_id]
        segment_b_start.append(len(ids))
        if example.text_pair is not None:
            ids += [*second, tokenizer.sep_id]
        sequences.append(np.array(ids))
    labels = None
    if examples[0].label is not None:
        labels = np.array([e.label for e in examples], np.float32 if isinstance(examples[0].label, float) else np.int64)
    return Features(
        token_ids=np.concatenate(sequences),
        sequence_start=np.cumsum([0, *map(len, sequences)]),
        segment_b_start=np.array(segment_b_start),
        labels=labels,
        note=f"{num_truncated:,} of {len(examples):,} cut to {max_seq_length} tokens"
        + (f", {num_empty:,} with an empty text" if num_empty else ""),
    )


def truncate_pair(first: list[int], second: list[int], budget: int) -> tuple[list[int], list[int]]:
    """Cut a pair to `budget` tokens, one at a time from the end of the longer text, of the second on a tie: what
    `_truncate_seq_pair` of google-research/bert's run_classifier.py leaves, without its loop.
    """
    num_first = min(len(first), max(budget - len(second), (budget + 1) // 2))
    return first[:num_first], second[: budget - num_first]


def gather_batch(features: Features, indices: np.ndarray) -> tuple[Sequences, torch.Tensor | None]:
    """The sequences `indices` [B] as one batch without padding, and their labels: [B], [B, 2] or [T] as in Features."""
    token_ids, lengths = features.token_ids[features.places(indices)], features.lengths[indices]
    labels = features.labels_of(indices)
    sequences = pack_sequences(token_ids, lengths, features.segment_b_start[indices])
    return sequences, None if labels is None else torch.from_numpy(labels)


def split_logits(logits: torch.Tensor, lengths: np.ndarray) -> list[torch.Tensor]:
    """The logits of each sequence of a batch: [L] each from [B, L], or [S, L] each from [T, L]. lengths: [B]."""
    return list(logits) if len(logits) == len(lengths) else list(logits.split(lengths.tolist()))


def epoch_batches(num_examples: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Shuffled batches of indices, each example once; a function of (seed, epoch). The last batch may be smaller."""
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    return np.split(order, range(batch_size, num_examples, batch_size))
