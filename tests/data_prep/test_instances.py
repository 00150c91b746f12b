"""Instances against an independent version of the reference algorithm on lists, and the rules of each pair task."""

import hashlib
import random

import numpy as np
import pytest

from data_prep.instances import InstanceRule, assemble, count_instances, drop_empty, make_instances
from data_prep.randomness import below, next_bits, shuffled_positions, start_stream, uniform
from tests.data_prep.small_corpus import make_bounds


def make(bounds, **rule):
    rule = InstanceRule(**{"seq_length": 64, **rule})
    return make_instances(*bounds, range(len(bounds[1]) - 1), rule)


def documents_as_lists(sentence_start, document_start):
    """Every document a list of sentences, every sentence a list of its tokens' places in the corpus."""
    sentences = [list(range(a, b)) for a, b in zip(sentence_start[:-1], sentence_start[1:], strict=True)]
    return [sentences[a:b] for a, b in zip(document_start[:-1], document_start[1:], strict=True)]


def reference_nsp(documents, number, max_tokens, short_seq_prob, rng):
    """NSP pairs of one document as create_pretraining_data.py makes them, one token at a time."""
    document, pairs, chunk, i = documents[number], [], [], 0
    target = rng.randint(2, max_tokens) if rng.random() < short_seq_prob else max_tokens
    while i < len(document):
        chunk.append(document[i])
        if i == len(document) - 1 or sum(map(len, chunk)) >= target:
            split = rng.randint(1, len(chunk) - 1) if len(chunk) > 1 else 1
            a = sum(chunk[:split], [])
            is_random = len(chunk) == 1 or rng.random() < 0.5
            if is_random:
                other = documents[rng.choice([d for d in range(len(documents)) if d != number])]
                b = []
                for sentence in other[rng.randint(0, len(other) - 1) :]:
                    b = b + sentence
                    if len(b) >= target - len(a):
                        break
                i -= len(chunk) - split
            else:
                b = sum(chunk[split:], [])
            while len(a) + len(b) > max_tokens:
                longer = a if len(a) > len(b) else b
                longer.pop(0 if rng.random() < 0.5 else -1)
            pairs.append((a, b, is_random))
            chunk = []
        i += 1
    return pairs


# The tolerances are four standard errors, from the spread of 200 seeds over this corpus.
@pytest.mark.parametrize(
    ("short_seq_prob", "tolerances"), [(0.0, (57, 0.026, 0.48, 0.53)), (1.0, (214, 0.031, 0.55, 0.80))]
)
def test_nsp_has_the_reference_algorithms_statistics(short_seq_prob, tolerances):
    bounds = make_bounds(300)
    documents = documents_as_lists(*bounds)
    rng = random.Random(1)
    reference = [
        (len(a), len(b), is_random)
        for _ in range(3)
        for number in range(len(documents))
        for a, b, is_random in reference_nsp(documents, number, 61, short_seq_prob, rng)
    ]
    ours = make(bounds, duplicates=20, short_seq_prob=short_seq_prob)
    num_a, num_b, is_random = np.array(reference).T
    expected = len(reference) / 3, is_random.mean(), num_a.mean(), num_b.mean()
    got = len(ours) / 20, ours["pair_label"].mean(), ours["a_length"].mean(), ours["b_length"].mean()
    for value, wanted, tolerance in zip(got, expected, tolerances, strict=True):
        assert value == pytest.approx(wanted, abs=tolerance)
    for length, wanted in ((ours["a_length"], num_a), (ours["b_length"], num_b)):
        shares = [np.bincount(values, minlength=62) / len(values) for values in (length, wanted)]
        assert np.abs(np.cumsum(shares[0] - shares[1])).max() < 0.04, "the lengths' distribution functions"


def test_share_of_random_next_is_a_half_where_there_is_a_choice():
    # Sentences of 10 tokens, no short sequences: only the last chunk of a document may have a single sentence.
    bounds = np.arange(0, 200_001, 10), np.arange(0, 20_001, 100)
    label = make(bounds, short_seq_prob=0.0)["pair_label"]
    assert label.mean() == pytest.approx(0.5, abs=4 * 0.5 / len(label) ** 0.5 + 0.02)


def test_truncation_keeps_the_lengths_of_the_token_by_token_rule():
    # With two documents of one sentence each, A and B are known, and so is what has to be cut.
    for first, second in ((5, 9), (40, 40), (41, 40), (200, 3), (3, 200), (30, 31), (31, 30), (1000, 900)):
        instances = make((np.array([0, first, first + second]), np.array([0, 1, 2])), short_seq_prob=0.0)
        for own, other, got in ((first, second, instances[0]), (second, first, instances[1])):
            while own + other > 61:
                own, other = (own - 1, other) if own > other else (own, other - 1)
            assert (got["a_length"], got["b_length"]) == (own, other)


def test_truncation_takes_from_both_ends_equally():
    instances = make((np.array([0, 100, 101]), np.array([0, 1, 2])), duplicates=4000, short_seq_prob=0.0)
    cut = instances["a_start"][instances["a_length"] == 60]
    assert (cut.min() >= 0) and (cut.max() <= 40)
    assert cut.mean() == pytest.approx(20, abs=4 * 10**0.5 / len(cut) ** 0.5)  # heads of 40 coins: mean 20, variance 10


@pytest.mark.parametrize("pair_task", ["nsp", "sop", "none"])
def test_segments_keep_the_rules_of_their_task(pair_task):
    bounds = make_bounds(80)
    document_of = np.repeat(np.arange(80), np.diff(bounds[0][bounds[1]]))
    instances = make(bounds, pair_task=pair_task, duplicates=2)
    total = instances["a_length"].astype(int) + instances["b_length"]
    assert (instances["a_length"] > 0).all() and total.max() <= (62 if pair_task == "none" else 61)
    for _, a, b, num_a, num_b, label in instances.tolist():
        assert document_of[a] == document_of[a + num_a - 1]
        if pair_task == "none":
            assert (b, num_b, label) == (0, 0, -1)
            continue
        assert num_b > 0 and document_of[b] == document_of[b + num_b - 1]
        if pair_task == "nsp":
            assert (document_of[a] != document_of[b]) == label
        else:
            assert document_of[a] == document_of[b] and (a > b) == label


def test_sop_swaps_half_and_skips_documents_of_one_sentence():
    label = make(make_bounds(300), pair_task="sop", duplicates=4)["pair_label"]
    assert label.mean() == pytest.approx(0.5, abs=4 * 0.5 / len(label) ** 0.5)
    assert len(make((np.array([0, 9, 20]), np.array([0, 1, 2])), pair_task="sop")) == 0


def test_full_sentences_lose_and_repeat_nothing():
    bounds = np.array([0, 30, 60, 90, 400, 405]), np.array([0, 4, 5])
    instances = make(bounds, pair_task="none", short_seq_prob=0.0)
    spans = [(int(i["a_start"]), int(i["a_start"]) + int(i["a_length"])) for i in instances]
    assert spans == [(0, 60), (60, 90), (90, 152), (152, 214), (214, 276), (276, 338), (338, 400), (400, 405)]
    short = make(make_bounds(50), pair_task="none", short_seq_prob=1.0)
    covered = np.concatenate([np.arange(i["a_start"], i["a_start"] + i["a_length"]) for i in short])
    assert (covered == np.arange(make_bounds(50)[0][-1])).all()


def test_a_documents_instances_do_not_depend_on_what_is_made_with_it():
    bounds, rule = make_bounds(40), InstanceRule(64)
    whole = make_instances(*bounds, range(40), rule)
    parts = [make_instances(*bounds, range(first, first + 8), rule) for first in range(0, 40, 8)]
    assert (np.concatenate(parts) == whole).all()
    assert sum(count_instances(*bounds, range(first, first + 8), rule) for first in range(0, 40, 8)) == len(whole)
    other_seed = make_instances(*bounds, range(40), rule._replace(seed=1))
    assert other_seed.tobytes() != whole.tobytes()


def test_golden_instances():
    columns = make(make_bounds(50), duplicates=2)
    text = "\n".join(map(str, columns.tolist()))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "9e96dec88b90c22b"


def test_empty_sentences_and_documents_are_dropped():
    sentence_start, document_start = drop_empty(np.array([0, 0, 4, 4, 9, 9]), np.array([0, 1, 1, 3, 4, 5, 5]))
    assert (sentence_start.tolist(), document_start.tolist()) == ([0, 4, 9], [0, 1, 2])
    assert drop_empty(np.array([0]), np.array([0]))[1].tolist() == [0]


def test_assemble_puts_the_special_tokens_where_they_belong():
    instances = make((np.array([0, 3, 5]), np.array([0, 1, 2])), short_seq_prob=0.0)
    records = assemble(np.arange(10, 15, dtype=np.uint16), instances, cls_id=2, sep_id=3, dtype=np.uint32)
    assert records.token_ids.tolist() == [2, 10, 11, 12, 3, 13, 14, 3, 2, 13, 14, 3, 10, 11, 12, 3]
    assert records.token_ids.dtype == records.masked_lm_labels.dtype == np.uint32
    assert (records.lengths.tolist(), records.segment_b_start.tolist()) == ([8, 8], [5, 4])
    assert records.num_predictions.tolist() == [0, 0] and len(records.masked_lm_positions) == 0
    single = make((np.array([0, 3, 5]), np.array([0, 2])), pair_task="none", short_seq_prob=0.0)
    records = assemble(np.arange(10, 15), single, cls_id=2, sep_id=3, dtype=np.uint16)
    assert (records.token_ids.tolist(), records.segment_b_start.tolist()) == ([2, 10, 11, 12, 13, 14, 3], [7])


def test_streams_are_splitmix64():
    stream = np.zeros(1, np.uint64)
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # its published output for seed 0
    assert [int(next_bits(stream)) for _ in known] == known
    start_stream(stream, 1, 2, 3, 4)
    draws = np.array([below(stream, 7) for _ in range(7000)])
    assert np.abs(np.bincount(draws, minlength=7) - 1000).max() < 4 * 1000**0.5
    start_stream(stream, 1, 2, 3, 5)
    assert 0.47 < np.mean([uniform(stream) for _ in range(2000)]) < 0.53


@pytest.mark.parametrize("size", [1, 2, 5, 64, 1000, 4097])
def test_the_shuffle_is_a_permutation_in_any_pieces(size):
    whole = shuffled_positions(0, size, size, 3)
    assert sorted(whole) == list(range(size))
    pieces = [shuffled_positions(first, min(first + 100, size), size, 3) for first in range(0, size, 100)]
    assert (np.concatenate(pieces) == whole).all()
    if size > 100:
        assert abs(np.corrcoef(np.arange(size), whole)[0, 1]) < 4 / size**0.5
        assert (shuffled_positions(0, size, size, 4) == whole).mean() < 0.05
