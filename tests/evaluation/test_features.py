"""From examples to batches: the layout of a sequence, truncation, shuffling."""

import numpy as np
import pytest

from evaluation.tasks.classification import Example
from evaluation.tasks.features import encode_examples, epoch_batches, gather_batch, truncate_pair


class CountingTokenizer:
    """Stands in for a tokenizer: a word of n characters becomes the id n."""

    cls_id, sep_id = 100, 101

    def encode(self, text):
        return [len(word) for word in text.split()]


def test_pairs_and_single_sentences_in_one_flat_batch():
    examples = [Example("a bb", "ccc", 1), Example("dddd", None, 0), Example("a a a a a a", "bb bb bb", 1)]
    features = encode_examples(CountingTokenizer(), examples, 8, "test")
    assert features.note == "1 of 3 cut to 8 tokens"
    empty = encode_examples(CountingTokenizer(), [*examples, Example(" ", None, 0), Example("a", "", 0)], 8, "test")
    assert empty.note == "1 of 5 cut to 8 tokens, 2 with an empty text"
    sequences, labels = gather_batch(features, np.array([2, 0, 1]))
    assert sequences.token_ids.tolist() == [100, 1, 1, 1, 101, 2, 2, 101] + [100, 1, 2, 101, 3, 101] + [100, 4, 101]
    assert sequences.segment_ids.tolist() == [0] * 5 + [1] * 3 + [0] * 4 + [1] * 2 + [0] * 3
    assert sequences.position_ids.tolist() == [*range(8), *range(6), *range(3)]
    assert sequences.cu_seqlens.tolist() == [0, 8, 14, 17]
    assert sequences.max_seqlen == 8
    assert labels.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("num_first", "num_second", "budget"), [(9, 2, 6), (2, 9, 6), (7, 7, 7), (8, 7, 6), (3, 3, 6), (0, 9, 4)]
)
def test_truncation_takes_from_the_longer_text(num_first, num_second, budget):
    first, second = list(range(num_first)), list(range(num_second))
    kept_first, kept_second = truncate_pair(first, second, budget)
    while len(first) + len(second) > budget:  # the published loop
        (first if len(first) > len(second) else second).pop()
    assert (kept_first, kept_second) == (first, second)


def test_an_epoch_sees_each_example_once_in_an_order_of_its_own():
    batches = epoch_batches(10, 4, seed=0, epoch=1)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(np.concatenate(batches)) == list(range(10))
    assert np.array_equal(np.concatenate(batches), np.concatenate(epoch_batches(10, 4, seed=0, epoch=1)))
    assert not np.array_equal(np.concatenate(batches), np.concatenate(epoch_batches(10, 4, seed=0, epoch=2)))
