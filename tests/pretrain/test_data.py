"""The order of samples and the making of batches: functions of (seed, step), the same for every layout."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from data_prep import build
from data_prep.shards import Shards
from pretrain.data import (
    BLOCK_SIZE,
    check_ids,
    draw_samples,
    evaluation_batches,
    make_batch,
    num_drawn,
    read_records,
    rule_of_shards,
    samples_at,
    training_batches,
)
from pretrain.layout import Layout, init_layout
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def test_an_epoch_visits_every_sample_once_in_blocks():
    num_samples = 5 * BLOCK_SIZE + 17
    order = samples_at(seed=3, start=0, count=num_samples, num_samples=num_samples)
    assert sorted(order) == list(range(num_samples))
    assert (np.diff(order) == 1).mean() > 0.95
    assert not np.array_equal(order, samples_at(3, num_samples, num_samples, num_samples))


def test_any_part_of_the_endless_sequence_is_the_same_part():
    whole = samples_at(seed=3, start=0, count=2000, num_samples=700)
    assert np.array_equal(samples_at(3, 650, 200, 700), whole[650:850])


@pytest.mark.parametrize("num_samples", [1, BLOCK_SIZE - 1, BLOCK_SIZE, 3 * BLOCK_SIZE + 1, 9 * BLOCK_SIZE])
def test_the_order_is_that_of_whole_blocks_put_behind_one_another(num_samples):
    for epoch in range(4):
        blocks = np.random.default_rng((3, epoch)).permutation(-(-num_samples // BLOCK_SIZE))
        order = (blocks[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).reshape(-1)
        found = samples_at(3, epoch * num_samples, num_samples, num_samples)
        assert np.array_equal(found, order[order < num_samples])


WEIGHTS = [Fraction("0.3"), Fraction(5), Fraction("1e-3"), Fraction(1, 3)]


def test_a_mixture_has_the_shares_of_its_weights_at_every_place():
    shares = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    before = [0] * len(WEIGHTS)
    for place in [*range(3000), 10**12, 10**12 + 1]:
        counts = num_drawn(place, WEIGHTS)
        assert sum(counts) == place and all(0 <= last <= now for last, now in zip(before, counts, strict=True))
        errors = [abs(count - place * share) for count, share in zip(counts, shares, strict=True)]
        assert max(errors) < len(WEIGHTS)
        before = counts
    assert num_drawn(18, [Fraction(3), Fraction(1)]) == [13, 5]  # the module's example


def test_each_data_set_of_a_mixture_has_its_own_whole_epochs():
    """However the sequence is cut into batches; a single one is what it is alone, whatever its weight."""
    sizes = [300, 2 * BLOCK_SIZE + 17, 5, 40]
    whole = draw_samples(7, 0, 5000, sizes, WEIGHTS)
    batches = np.concatenate([draw_samples(7, start, 40, sizes, WEIGHTS) for start in range(0, 5000, 40)], axis=1)
    for data_set, size in enumerate(sizes):
        _, indices, epochs = whole[:, whole[0] == data_set]
        assert np.array_equal(batches[1:, batches[0] == data_set], [indices, epochs])
        assert np.array_equal(indices, samples_at(7, 0, len(indices), size))
        for epoch in range(len(indices) // size):
            assert sorted(indices[epochs == epoch]) == list(range(size))
    assert max(whole[2, whole[0] == 1]) > 5  # it has been read several times
    alone = draw_samples(7, 1234, 900, [700], [Fraction(2)])
    assert np.array_equal(alone[1], samples_at(7, 1234, 900, 700)) and not alone[0].any()


@pytest.mark.parametrize("weights", [[1], [3, 1]], ids=["one set", "two sets"])
@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_every_layout_sees_the_same_global_batch(dp_size, weights, shard_folders):
    data = list(zip(map(Shards, shard_folders), map(Fraction, weights), strict=False))
    whole = next(training_batches(data, 0, 16, 16, Layout(1, 1, 0, 0, CPU), range(5, 6)))
    parts = [
        next(training_batches(data, 0, 16, 2, Layout(dp_size, 1, rank, 0, CPU), range(5, 6))) for rank in range(dp_size)
    ]
    samples = np.concatenate([samples for part in parts for samples in part.samples], axis=1)
    assert np.array_equal(samples, whole.samples[0])
    assert np.bincount(samples[0]).tolist() == [16 * weight // sum(weights) for weight in weights]
    for (data_set, index, _), row in zip(samples.T, range(16), strict=True):
        starts = whole.micro_batches[0].sequences.cu_seqlens
        tokens = whole.micro_batches[0].sequences.token_ids[starts[row] : starts[row + 1]]
        assert tokens.tolist() == data[data_set][0].gather(np.array([index])).token_ids.tolist()
    tokens = torch.cat([batch.sequences.token_ids for part in parts for batch in part.micro_batches])
    assert torch.equal(tokens, whole.micro_batches[0].sequences.token_ids)
    assert {part.num_predictions for part in parts} == {len(whole.micro_batches[0].masked_lm_labels)}


def test_a_batch_is_what_the_records_say(shard_folders):
    shards = Shards(shard_folders[0])
    indices = np.array([3, 0, 7])
    records = shards.gather(indices)
    batch = make_batch(records)
    starts = batch.sequences.cu_seqlens
    for row, index in enumerate(indices):
        alone = shards.gather(np.array([index]))
        part = slice(starts[row], starts[row + 1])
        assert batch.sequences.token_ids[part].tolist() == alone.token_ids.tolist()
        assert batch.sequences.position_ids[part].tolist() == list(range(len(alone.token_ids)))
        assert int(batch.sequences.segment_ids[part].sum()) == len(alone.token_ids) - alone.segment_b_start[0]
    manifest = shards.manifest["vocab"]
    masked = batch.sequences.token_ids[batch.masked_lm_rows]
    assert 0.6 < (masked == manifest["mask_id"]).float().mean() <= 1.0


def test_dynamic_masks_begin_with_the_stored_ones_and_change_by_the_epoch(shard_folders):
    shards = Shards(shard_folders[0])
    rule = rule_of_shards(shards)
    indices = np.array([3, 0, 7, 12, 40])
    stored, first, second = (
        make_batch(read_records(shards, indices, *more))
        for more in ((), (np.zeros(5, np.int64), rule), (np.array([1, 0, 1, 0, 1]), rule))
    )
    for name in ("masked_lm_rows", "masked_lm_labels"):
        assert torch.equal(getattr(stored, name), getattr(first, name))
    assert torch.equal(stored.sequences.token_ids, first.sequences.token_ids)
    starts = stored.sequences.cu_seqlens
    differs = [
        not torch.equal(*(batch.sequences.token_ids[starts[row] : starts[row + 1]] for batch in (stored, second)))
        for row in range(5)
    ]
    assert differs == [True, False, True, False, True]
    for batch in (stored, second):  # the text behind the masks is the same
        batch.sequences.token_ids[batch.masked_lm_rows] = batch.masked_lm_labels
    assert torch.equal(stored.sequences.token_ids, second.sequences.token_ids)


def count_predictions(folders, num_steps):
    """(what the loader says of each step, what this rank holds of it, the sum of its labels)."""
    data = [(Shards(folder), Fraction(1)) for folder in folders]
    batches = training_batches(data, 0, 16, 4, init_layout(), range(num_steps), dynamic_masks=True)
    rows = []
    for batch in batches:
        labels = torch.cat([part.masked_lm_labels for part in batch.micro_batches])
        rows.append((batch.num_predictions, len(labels), int(labels.sum())))
    return tuple(list(column) for column in zip(*rows, strict=True))


def test_every_rank_knows_how_many_words_were_masked_on_all(shard_folders, tmp_path):
    """Whole words give other numbers of predictions in another epoch; the loss is divided by those of all ranks."""
    options = ["--seq-length", "64", "--max-predictions", "10", "--duplicates", "1", "--whole-word"]
    folders = [tmp_path / folder.name for folder in shard_folders]
    for folder in folders:
        corpus = shard_folders[0].parent / f"{folder.name}_corpus"
        build.main(["--corpus", str(corpus), "--output", str(folder), *options])
    num_steps = 3 * Shards(folders[0]).num_sequences // 16
    ((alone, _, labels),) = run_ranks(count_predictions, 1, folders, num_steps)
    (told, *first), (also_told, *second) = run_ranks(count_predictions, 2, folders, num_steps)
    numbers, sums = np.add(first, second)
    assert told == also_told == alone == numbers.tolist() and labels == sums.tolist()
    data = [(Shards(folder), Fraction(1)) for folder in folders]
    stored = training_batches(data, 0, 16, 16, Layout(1, 1, 0, 0, CPU), range(num_steps))
    same = [
        int(step.micro_batches[0].masked_lm_labels.sum()) == total for step, total in zip(stored, labels, strict=True)
    ]
    num_first = 2 * data[1][0].num_sequences // 16  # steps until the smaller set begins again, with other masks
    assert all(same[:num_first]) and sum(same[num_first + 1 :]) < 3  # other masks may have one sum by chance


@pytest.mark.parametrize("column", ["token_ids", "masked_lm_labels"])
def test_an_id_beyond_the_vocabulary_is_named_by_its_sample(column, shard_folders):
    shards = Shards(shard_folders[0])
    indices = np.array([3, 0, 7])
    records = shards.gather(indices)
    size = shards.manifest["vocab"]["size"]
    check_ids(records, indices, shards)
    getattr(records, column)[-1] = size
    with pytest.raises(ValueError, match=f"sample 7 of .*train holds token id {size}, but the vocabulary has {size} e"):
        check_ids(records, indices, shards)


@pytest.mark.parametrize("dp_size", [1, 3])
def test_evaluation_counts_every_sample_once_and_ranks_stay_in_step(dp_size, shard_folders):
    shards = Shards(shard_folders[1])
    per_rank = [list(evaluation_batches(shards, 5, Layout(dp_size, 1, rank, 0, CPU))) for rank in range(dp_size)]
    assert len({len(batches) for batches in per_rank}) == 1
    counted = sum(batch.sequences.num_sequences for batches in per_rank for batch, counts in batches if counts)
    assert counted == shards.num_sequences
