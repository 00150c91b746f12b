"""The order of samples and the making of batches: functions of (seed, step), the same for every layout."""

import numpy as np
import pytest
import torch

from data_prep import build
from data_prep.shards import Shards
from pretrain.data import (
    BLOCK_SIZE,
    check_ids,
    evaluation_batches,
    make_batch,
    read_batch,
    rule_of_shards,
    sample_indices,
    training_batches,
)
from pretrain.layout import Layout, init_layout
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def test_an_epoch_visits_every_sample_once_in_blocks():
    num_samples = 5 * BLOCK_SIZE + 17
    order = sample_indices(seed=3, start=0, count=num_samples, num_samples=num_samples)
    assert sorted(order) == list(range(num_samples))
    assert (np.diff(order) == 1).mean() > 0.95
    assert not np.array_equal(order, sample_indices(3, num_samples, num_samples, num_samples))


def test_any_part_of_the_endless_sequence_is_the_same_part():
    whole = sample_indices(seed=3, start=0, count=2000, num_samples=700)
    assert np.array_equal(sample_indices(3, 650, 200, 700), whole[650:850])


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_every_layout_sees_the_same_global_batch(dp_size, shard_folders):
    shards = Shards(shard_folders[0])
    whole = next(training_batches(shards, 0, 16, 16, Layout(1, 1, 0, 0, CPU), range(5, 6)))
    parts = [
        next(training_batches(shards, 0, 16, 2, Layout(dp_size, 1, rank, 0, CPU), range(5, 6)))
        for rank in range(dp_size)
    ]
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
    masked = batch.sequences.token_ids[batch.masked_lm_positions]
    assert 0.6 < (masked == manifest["mask_id"]).float().mean() <= 1.0


def test_dynamic_masks_begin_with_the_stored_ones_and_change_by_the_epoch(shard_folders):
    shards = Shards(shard_folders[0])
    rule = rule_of_shards(shards)
    indices = np.array([3, 0, 7, 12, 40])
    stored, first, second = (
        read_batch(shards, indices, *more)
        for more in ((), (np.zeros(5, np.int64), rule), (np.array([1, 0, 1, 0, 1]), rule))
    )
    for name in ("masked_lm_positions", "masked_lm_labels"):
        assert torch.equal(getattr(stored, name), getattr(first, name))
    assert torch.equal(stored.sequences.token_ids, first.sequences.token_ids)
    starts = stored.sequences.cu_seqlens
    differs = [
        not torch.equal(*(batch.sequences.token_ids[starts[row] : starts[row + 1]] for batch in (stored, second)))
        for row in range(5)
    ]
    assert differs == [True, False, True, False, True]
    for batch in (stored, second):  # the text behind the masks is the same
        batch.sequences.token_ids[batch.masked_lm_positions] = batch.masked_lm_labels
    assert torch.equal(stored.sequences.token_ids, second.sequences.token_ids)


def count_predictions(folder, num_steps):
    """(what the loader says of each step, what this rank holds of it)."""
    batches = training_batches(Shards(folder), 0, 16, 4, init_layout(), range(num_steps), dynamic_masks=True)
    told_and_held = [
        (batch.num_predictions, sum(len(part.masked_lm_labels) for part in batch.micro_batches)) for batch in batches
    ]
    return tuple(list(column) for column in zip(*told_and_held, strict=True))


def test_every_rank_knows_how_many_words_were_masked_on_all(shard_folders, tmp_path):
    """Whole words give other numbers of predictions in another epoch; the loss is divided by those of all ranks."""
    corpus = str(shard_folders[0].parent / "train_corpus")
    options = ["--seq-length", "64", "--max-predictions", "10", "--duplicates", "1", "--whole-word"]
    build.main(["--corpus", corpus, "--output", str(tmp_path / "words"), *options])
    shards = Shards(tmp_path / "words")
    num_steps = 3 * shards.num_sequences // 16
    ((alone, _),) = run_ranks(count_predictions, 1, tmp_path / "words", num_steps)
    (told, first), (also_told, second) = run_ranks(count_predictions, 2, tmp_path / "words", num_steps)
    assert told == also_told == alone == [a + b for a, b in zip(first, second, strict=True)]
    assert sum(alone) != 3 * shards.manifest["num_predictions"]


@pytest.mark.parametrize("column", ["token_ids", "masked_lm_labels"])
def test_an_id_beyond_the_vocabulary_is_named_by_its_sample(column, shard_folders):
    shards = Shards(shard_folders[0])
    indices = np.array([3, 0, 7])
    records = shards.gather(indices)
    size = shards.manifest["vocab"]["size"]
    check_ids(records, indices, size)
    getattr(records, column)[-1] = size
    with pytest.raises(ValueError, match=f"sample 7 holds token id {size}, but the vocabulary has {size} entries"):
        check_ids(records, indices, size)


@pytest.mark.parametrize("dp_size", [1, 3])
def test_evaluation_counts_every_sample_once_and_ranks_stay_in_step(dp_size, shard_folders):
    shards = Shards(shard_folders[1])
    per_rank = [list(evaluation_batches(shards, 5, Layout(dp_size, 1, rank, 0, CPU))) for rank in range(dp_size)]
    assert len({len(batches) for batches in per_rank}) == 1
    counted = sum(batch.sequences.num_sequences for batches in per_rank for batch, counts in batches if counts)
    assert counted == shards.num_sequences
