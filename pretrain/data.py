"""Masked shards -> batches. The global batch is a function of (seed, step), and each rank takes its slice.

A resumed run therefore needs only the number of its next step, and every layout sees the same samples in the same step.
Samples were shuffled when the shards were built. An epoch permutes only blocks of neighbours, so that reads are mostly
sequential. Masks are those stored in the shards or, if dynamic (Liu et al. 2019, section 4.1), new ones per epoch from
the same function, which drew the stored ones for epoch 0.

Several data sets are mixed by weight. How many of the first k samples come from each set depends on k alone
(`num_drawn`), and each set's samples follow its own sequence of epochs. With weights 3 and 1 and batches of 6:

    step      0          1            2
    books     0 1 2 3    4 5 6 7 8    9 10 11 12
    news      0 1        2            3 4
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from data_prep.files import sha256_file
from data_prep.masking import MaskingRule, mask_sequences, masking_rule
from data_prep.shards import Records, Shards, join_records
from data_prep.text.tokenizer import load_tokenizer
from pretrain.layers import Sequences
from pretrain.layout import Layout
from pretrain.model import PretrainingBatch

BLOCK_SIZE = 256  # samples that stay together in an epoch's permutation
MASKING_SETTINGS = ("masked_lm_prob", "max_predictions", "whole_word", "max_ngram")  # in a shard folder's manifest


@dataclass
class StepBatch:
    """This rank's micro-batches of one step, and the counts of the whole step over all ranks."""

    micro_batches: list[PretrainingBatch]
    samples: list[np.ndarray]  # per micro-batch, as `draw_samples` returns them
    num_samples: int
    num_predictions: int
    num_pairs: int


def num_drawn(place: int, weights: Sequence[Fraction]) -> list[int]:
    """How many of the first `place` samples come from each data set: its share, with an error below the number of sets.

    The first set gets its share of all samples, rounded down, the second its share of the rest, and so on. Counts never
    fall as `place` grows, and they are exact because the weights are fractions.
    """
    counts, left, weight_left = [], place, sum(weights)
    for weight in weights:
        counts.append(left * weight // weight_left)
        left, weight_left = left - counts[-1], weight_left - weight
    return counts


def draw_samples(seed: int, start: int, count: int, sizes: Sequence[int], weights: Sequence[Fraction]) -> np.ndarray:
    """[3, count] int64: data set, sample, epoch at places start, start + 1, ... of the mixture, grouped by data set."""
    runs = []
    ranges = zip(num_drawn(start, weights), num_drawn(start + count, weights), sizes, strict=True)
    for data_set, (first, end, size) in enumerate(ranges):
        samples = samples_at(seed, first, end - first, size)
        runs.append(np.stack([np.full(end - first, data_set), samples, np.arange(first, end) // size]))
    return np.concatenate(runs, axis=1)


def samples_at(seed: int, start: int, count: int, num_samples: int) -> np.ndarray:
    """[count] int64: the samples at places start, start + 1, ... of one data set's endless sequence of epochs.

    Each epoch visits every sample once, in blocks of `BLOCK_SIZE` whose order is a function of (seed, epoch).
    """
    parts = [np.empty(0, np.int64)]
    while count > 0:
        epoch, place = divmod(start, num_samples)
        part = _samples_of_epoch(seed, epoch, np.arange(place, min(place + count, num_samples)), num_samples)
        parts.append(part)
        start, count = start + len(part), count - len(part)
    return np.concatenate(parts)


def _samples_of_epoch(seed: int, epoch: int, places: np.ndarray, num_samples: int) -> np.ndarray:
    """The samples at `places` of an epoch. Only the order of blocks is in memory, not that of all samples."""
    num_blocks = -(-num_samples // BLOCK_SIZE)
    blocks = np.random.default_rng((seed, epoch)).permutation(num_blocks)
    num_missing = num_blocks * BLOCK_SIZE - num_samples  # the last block is shorter, so later places shift
    end_of_last = (np.flatnonzero(blocks == num_blocks - 1)[0] + 1) * BLOCK_SIZE - num_missing
    places = np.where(places < end_of_last, places, places + num_missing)
    return blocks[places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE


def pack_sequences(token_ids: np.ndarray, lengths: np.ndarray, segment_b_start: np.ndarray) -> Sequences:
    """Sequences for the encoder from concatenated token_ids [T], lengths [B] and the start of segment B in each [B]."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    position_ids = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    segment_ids = (position_ids >= np.repeat(segment_b_start, lengths)).astype(np.int64)
    return Sequences(
        token_ids=torch.from_numpy(token_ids.astype(np.int64, copy=False)),
        segment_ids=torch.from_numpy(segment_ids),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        max_seqlen=int(lengths.max()),
    )


def make_batch(records: Records) -> PretrainingBatch:
    """A micro-batch of tensors from records."""
    return PretrainingBatch(
        sequences=pack_sequences(records.token_ids, records.lengths, records.segment_b_start),
        masked_lm_rows=torch.from_numpy(records.masked_lm_rows()),
        masked_lm_labels=torch.from_numpy(records.masked_lm_labels),
        pair_labels=torch.from_numpy(records.pair_labels),
    )


def read_records(
    shards: Shards, samples: np.ndarray, epochs: np.ndarray | None = None, rule: MaskingRule | None = None
) -> Records:
    """Read and check the records of `samples` [B] of one data set. A rule masks them for their `epochs` [B]."""
    records = shards.gather(samples)
    check_ids(records, samples, shards)
    if rule is not None:
        seed = shards.manifest["config"]["seed"]
        records = mask_sequences(records, samples, rule, seed=seed, epoch=epochs)
    return records


def rule_of_shards(shards: Shards) -> MaskingRule:
    """The rule by which the shards were masked."""
    settings = {name: shards.manifest["config"][name] for name in MASKING_SETTINGS}
    return masking_rule(load_tokenizer(shards.vocab_file), **settings)


def check_ids(records: Records, samples: np.ndarray, shards: Shards) -> None:
    """Raise ValueError for an id outside the vocabulary; a split embedding would silently return zeros for it."""
    vocab_size = shards.manifest["vocab"]["size"]
    for ids, counts in ((records.token_ids, records.lengths), (records.masked_lm_labels, records.num_predictions)):
        if ids.max(initial=0) < vocab_size:
            continue
        first = np.argmax(ids >= vocab_size)
        sample = np.repeat(samples, counts)[first]
        raise ValueError(
            f"sample {sample} of {shards.folder} holds token id {ids[first]}, but the vocabulary has {vocab_size}"
            f" entries: the shards are damaged or not ours; check them with `python -m data_prep.show {shards.folder}"
            " --verify`"
        )


def require_undamaged(data_sets: Sequence[Shards], layout: Layout) -> None:
    """Raise ValueError on all ranks if shards do not match their checksums. Collective: the ranks share the work."""
    files = {
        shards.folder / entry["file"]: entry["sha256"] for shards in data_sets for entry in shards.manifest["shards"]
    }
    mine = list(files)[layout.rank :: layout.world_size]
    damaged = [str(path) for path in mine if sha256_file(path) != files[path]]
    if damaged := [path for found in layout.gather(damaged) for path in found]:
        raise ValueError(
            f"{', '.join(damaged)}: not the bytes that were written (sha256 differs); copy them again or rebuild the"
            " folder with `python -m data_prep.build`"
        )


def split_samples(samples: np.ndarray, micro_batch_size: int, layout: Layout) -> list[np.ndarray]:
    """This rank's share of a global batch [3, B], cut into micro-batches."""
    mine = np.array_split(samples, layout.dp_size, axis=1)[layout.dp_rank]
    return np.split(mine, mine.shape[1] // micro_batch_size, axis=1)


def training_batches(
    data: Sequence[tuple[Shards, Fraction]],
    seed: int,
    batch_size: int,
    micro_batch_size: int,
    layout: Layout,
    steps: range,
    dynamic_masks: bool = False,
) -> Iterator[StepBatch]:
    """The batches of `steps`. A thread reads the next one while the caller computes.

    With dynamic masks every step is collective: the ranks sum their numbers of predictions.
    """
    data_sets, weights = zip(*data, strict=True)
    sizes = [shards.num_sequences for shards in data_sets]
    rule = rule_of_shards(data_sets[0]) if dynamic_masks else None  # the other sets were masked by the same rule

    def read_batch(samples: np.ndarray) -> PretrainingBatch:  # [3, b]
        parts = []
        for data_set in np.unique(samples[0]):
            _, numbers, epochs = samples[:, samples[0] == data_set]
            parts.append(read_records(data_sets[data_set], numbers, epochs, rule))
        return make_batch(join_records(parts))

    def read(step: int) -> StepBatch:
        samples = draw_samples(seed, step * batch_size, batch_size, sizes, weights)
        mine = split_samples(samples, micro_batch_size, layout)
        parts = [read_batch(part) for part in mine]
        if rule is None:
            num_predictions = sum(
                int(shards.num_predictions(samples[1, samples[0] == data_set]).sum())
                for data_set, shards in enumerate(data_sets)
            )
        else:
            num_predictions = sum(len(part.masked_lm_labels) for part in parts)  # of this rank
        num_pairs = 0 if data_sets[0].manifest["config"]["pair_task"] == "none" else batch_size
        return StepBatch(parts, mine, batch_size, num_predictions, num_pairs)

    with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
        coming = [pool.submit(read, step) for step in steps[:1]]
        for step in steps:
            batch = coming.pop().result()
            if step + 1 in steps:
                coming.append(pool.submit(read, step + 1))
            if rule is not None:
                count = torch.tensor(batch.num_predictions)
                batch.num_predictions = int(layout.sum_over_data_parallel(count).item())
            yield batch


def evaluation_batches(
    shards: Shards, micro_batch_size: int, layout: Layout
) -> Iterator[tuple[PretrainingBatch, bool]]:
    """All samples of a held-out set, spread over the data-parallel ranks: (batch, whether it counts).

    All ranks get the same number of batches, because ZeRO 3 gathers weights collectively. A rank that runs out repeats
    the first samples, which do not count.
    """
    starts = range(0, shards.num_sequences, micro_batch_size)
    for first in range(0, len(starts), layout.dp_size):
        mine = first + layout.dp_rank
        counts = mine < len(starts)
        start = starts[mine] if counts else 0
        samples = np.arange(start, min(start + micro_batch_size, shards.num_sequences))
        yield make_batch(read_records(shards, samples)), counts
