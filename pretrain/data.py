"""Masked shards -> batches: the global batch is a function of (seed, data step), and a rank takes its slice of it.

Nothing here has state to save: a resume needs only the number of the next step, and every layout sees the same samples
in the same step. Samples were shuffled when the shards were built; an epoch permutes blocks of neighbours, so that
readers see sequential runs. Masks are those stored in the shards or, if dynamic (Liu et al. 2019, section 4.1), drawn
anew in each epoch by the function that drew the stored ones, which are those of epoch 0.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from data_prep.masking import MaskingRule, mask_sequences, masking_rule
from data_prep.shards import Records, Shards
from data_prep.tokenizer import load_tokenizer
from pretrain.layers import Sequences
from pretrain.layout import Layout
from pretrain.model import PretrainingBatch

BLOCK_SIZE = 256  # samples that stay together in an epoch's permutation


@dataclass
class StepBatch:
    """One step's micro-batches of this rank, and what the whole step holds over all ranks."""

    micro_batches: list[PretrainingBatch]
    samples: list[np.ndarray]  # their numbers in the shards, one array a micro-batch
    num_samples: int
    num_predictions: int
    num_pairs: int


def sample_indices(seed: int, start: int, count: int, num_samples: int) -> np.ndarray:
    """[count] int64: the samples at places start, start + 1, ... of the endless sequence of epochs.

    Each epoch visits every sample once, its blocks of `BLOCK_SIZE` in an order that is a function of (seed, epoch).
    """
    parts = []
    while count > 0:
        epoch, place = divmod(start, num_samples)
        order = _epoch_order(seed, epoch, num_samples)
        part = order[place : place + count]
        parts.append(part)
        start, count = start + len(part), count - len(part)
    return np.concatenate(parts)


def _epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """[num_samples] Blocks in the order of this epoch."""
    blocks = np.random.default_rng((seed, epoch)).permutation(-(-num_samples // BLOCK_SIZE))
    order = (blocks[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).reshape(-1)
    return order[order < num_samples]


def pack_sequences(token_ids: np.ndarray, lengths: np.ndarray, segment_b_start: np.ndarray) -> Sequences:
    """B sequences behind one another, as the encoder reads them: token_ids [T], lengths [B], where segment B begins in
    each [B].
    """
    starts = np.concatenate([[0], np.cumsum(lengths)])
    position_ids = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    segment_ids = (position_ids >= np.repeat(segment_b_start, lengths)).astype(np.int64)
    cu_seqlens = torch.from_numpy(starts.astype(np.int32))
    ids = (token_ids.astype(np.int64, copy=False), segment_ids, position_ids)
    return Sequences(*(torch.from_numpy(array) for array in ids), cu_seqlens, int(lengths.max()))


def make_batch(records: Records) -> PretrainingBatch:
    """Records as tensors; predictions become places in T."""
    starts = np.cumsum(records.lengths) - records.lengths
    positions = records.masked_lm_positions + np.repeat(starts, records.num_predictions)
    targets = (positions, records.masked_lm_labels, records.pair_labels)
    sequences = pack_sequences(records.token_ids, records.lengths, records.segment_b_start)
    return PretrainingBatch(sequences, *(torch.from_numpy(target) for target in targets))


def read_batch(
    shards: Shards, indices: np.ndarray, epochs: np.ndarray | None = None, rule: MaskingRule | None = None
) -> PretrainingBatch:
    """The samples `indices` [B] as a checked micro-batch; with a rule, masked anew for the `epochs` [B]."""
    records = shards.gather(indices)
    check_ids(records, indices, shards.manifest["vocab"]["size"])
    if rule is not None:
        seed = shards.manifest["config"]["seed"]
        masked = mask_sequences(records.original_token_ids(), records.lengths, indices, rule, seed=seed, epoch=epochs)
        records = replace(records, **masked._asdict())
    return make_batch(records)


def rule_of_shards(shards: Shards) -> MaskingRule:
    """The rule by which the shards were masked."""
    names = ("masked_lm_prob", "max_predictions", "whole_word", "max_ngram")
    settings = {name: shards.manifest["config"][name] for name in names}
    return masking_rule(load_tokenizer(shards.vocab_file), **settings)


def check_ids(records: Records, indices: np.ndarray, vocab_size: int) -> None:
    """Raises ValueError that names the first sample with an id beyond the vocabulary: split over tensor-parallel ranks,
    the embedding would silently give zeros for it.
    """
    if max(records.token_ids.max(initial=0), records.masked_lm_labels.max(initial=0)) < vocab_size:
        return
    for ids, counts in (
        (records.token_ids, records.lengths),
        (records.masked_lm_labels, records.num_predictions),
    ):
        beyond = np.flatnonzero(ids >= vocab_size)
        if len(beyond):
            sample = indices[np.repeat(np.arange(len(counts)), counts)[beyond[0]]]
            raise ValueError(
                f"sample {sample} holds token id {ids[beyond[0]]}, but the vocabulary has {vocab_size} entries:"
                " the shards are damaged or not ours; `python -m data_prep.show DIR --verify` tells"
            )


def split_samples(indices: np.ndarray, micro_batch_size: int, layout: Layout) -> list[np.ndarray]:
    """This rank's share of a global batch, in micro-batches."""
    mine = np.array_split(indices, layout.dp_size)[layout.dp_rank]
    return np.split(mine, len(mine) // micro_batch_size)


def training_batches(
    shards: Shards,
    seed: int,
    batch_size: int,
    micro_batch_size: int,
    layout: Layout,
    steps: range,
    dynamic_masks: bool = False,
) -> Iterator[StepBatch]:
    """The batches of `steps`, the next one read in the background while the caller computes on the last.

    With dynamic masks the ranks add up their predictions, a collective of one number a step.
    """
    rule = rule_of_shards(shards) if dynamic_masks else None

    def read(step: int) -> StepBatch:
        start = step * batch_size
        indices = sample_indices(seed, start, batch_size, shards.num_sequences)
        epochs = np.arange(start, start + batch_size) // shards.num_sequences
        rows = split_samples(np.arange(batch_size), micro_batch_size, layout)
        parts = [read_batch(shards, indices[part], epochs[part], rule) for part in rows]
        if rule is None:
            num_predictions = int(shards.num_predictions(indices).sum())
        else:
            num_predictions = sum(len(part.masked_lm_labels) for part in parts)  # of this rank
        num_pairs = 0 if shards.manifest["config"]["pair_task"] == "none" else batch_size
        return StepBatch(parts, [indices[part] for part in rows], batch_size, num_predictions, num_pairs)

    with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
        coming = None
        for step in steps:
            batch = (coming or pool.submit(read, step)).result()
            coming = pool.submit(read, step + 1) if step + 1 in steps else None
            if rule is not None:
                count = torch.tensor(batch.num_predictions)
                batch.num_predictions = int(layout.sum_over_data_parallel(count).item())
            yield batch


def evaluation_batches(
    shards: Shards, micro_batch_size: int, layout: Layout
) -> Iterator[tuple[PretrainingBatch, bool]]:
    """All samples of a frozen set, spread over the data-parallel ranks: (batch, whether it counts).

    Every rank gets as many batches as every other, since the ranks of ZeRO 3 gather weights together: one that has run
    out repeats the first samples, which do not count.
    """
    starts = range(0, shards.num_sequences, micro_batch_size)
    for first in range(0, len(starts), layout.dp_size):
        mine = first + layout.dp_rank
        counts = mine < len(starts)
        start = starts[mine] if counts else 0
        indices = np.arange(start, min(start + micro_batch_size, shards.num_sequences))
        yield read_batch(shards, indices), counts
