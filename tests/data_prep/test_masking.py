"""Masks: the shares of the paper, what is never masked, whole words, and purity in (seed, epoch, sample)."""

import hashlib

import numpy as np
import pytest

from data_prep.masking import mask_sequences, masking_rule
from data_prep.shards import Records, starts_of
from tests.data_prep.small_corpus import VOCAB_SIZE, make_tokenizer

CLS, SEP, MASK = 2, 3, 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("vocab"))


def make_rule(tokenizer, *, masked_lm_prob=0.15, max_predictions=20, whole_word=False):
    return masking_rule(
        tokenizer, masked_lm_prob=masked_lm_prob, max_predictions=max_predictions, whole_word=whole_word
    )


def unmasked(tokens, lengths):
    """Sequences without masks that lie one after another in `tokens`."""
    return Records(
        sequence_start=starts_of(lengths),
        prediction_start=np.zeros(len(lengths) + 1, np.int64),
        token_ids=tokens,
        masked_lm_labels=np.empty(0, tokens.dtype),
        masked_lm_positions=np.empty(0, np.int64),
        segment_b_start=np.asarray(lengths),
        pair_labels=np.full(len(lengths), -1),
    )


def make_sequences(num_sequences, *, longest=160, seed=0):
    """Sequences [CLS] words [SEP] words [SEP] of 5 to `longest` tokens."""
    random = np.random.default_rng(seed)
    lengths = random.integers(5, longest + 1, num_sequences)
    tokens = random.integers(5, VOCAB_SIZE, lengths.sum()).astype(np.uint16)
    starts = np.cumsum(lengths) - lengths
    tokens[starts], tokens[starts + lengths // 2], tokens[starts + lengths - 1] = CLS, SEP, SEP
    return unmasked(tokens, lengths)


def mask(records, rule, **options):
    return mask_sequences(records, np.arange(len(records.lengths)), rule, **{"seed": 0, **options})


def test_special_tokens_are_never_masked_and_nothing_else_changes(tokenizer):
    records = make_sequences(500)
    tokens = records.token_ids
    masked = mask(records, make_rule(tokenizer))
    at = masked.masked_lm_rows()
    assert (np.diff(at) > 0).all(), "in the order of the tokens, none twice"
    assert not np.isin(tokens[at], [0, CLS, SEP, MASK]).any()
    assert (masked.masked_lm_labels == tokens[at]).all() and masked.masked_lm_labels.dtype == np.uint16
    assert (masked.original_token_ids() == tokens).all()
    assert (masked.token_ids != tokens).any() and len(records.masked_lm_labels) == 0, "the input is not changed"


@pytest.mark.parametrize(("masked_lm_prob", "max_predictions"), [(0.15, 20), (0.15, 5), (0.5, 80), (0.99, 159)])
def test_number_of_predictions(tokenizer, masked_lm_prob, max_predictions):
    records = make_sequences(300)
    masked = mask(records, make_rule(tokenizer, masked_lm_prob=masked_lm_prob, max_predictions=max_predictions))
    wanted = [min(max_predictions, max(1, round(n * masked_lm_prob)), n - 3) for n in records.lengths.tolist()]
    assert masked.num_predictions.tolist() == wanted


def test_eighty_ten_ten_uniformly_over_all_positions(tokenizer):
    masked = mask(make_sequences(20_000, longest=60), make_rule(tokenizer))
    shown, labels = masked.token_ids[masked.masked_lm_rows()], masked.masked_lm_labels
    is_mask, is_kept = shown == MASK, shown == labels
    for share, wanted in ((is_mask, 0.8), (is_kept, 0.1 + 0.1 / (VOCAB_SIZE - 4))):
        assert share.mean() == pytest.approx(wanted, abs=4 * (wanted * (1 - wanted) / len(labels)) ** 0.5)
    replaced = shown[~is_mask & ~is_kept]
    assert np.isin(replaced, [0, CLS, SEP, MASK]).sum() == 0
    assert len(np.unique(replaced)) == VOCAB_SIZE - 4, "any ordinary token, [UNK] too"
    same_length = np.tile(np.array([CLS, *range(5, 35), SEP], np.uint16), 20_000)
    masked = mask(unmasked(same_length, np.full(20_000, 32)), make_rule(tokenizer))
    counts = np.bincount(masked.masked_lm_positions, minlength=32)[1:31]
    expected = len(masked.masked_lm_positions) / 30
    assert np.abs(counts - expected).max() < 4.5 * expected**0.5


def test_masks_are_a_function_of_seed_epoch_and_sample(tokenizer):
    records = make_sequences(50)
    tokens, lengths = records.token_ids, records.lengths
    rule, samples = make_rule(tokenizer), np.arange(1000, 1050)

    def masked_tokens(records, samples, seed=7, epoch=3):
        return mask_sequences(records, samples, rule, seed=seed, epoch=epoch).token_ids

    whole = masked_tokens(records, samples)
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    one_by_one = [masked_tokens(unmasked(part, [len(part)]), [i]) for part, i in zip(parts, samples, strict=True)]
    assert (np.concatenate(one_by_one) == whole).all()
    for other in ({"seed": 8}, {"epoch": 4}):
        assert (masked_tokens(records, samples, **other) != whole).any()
    assert (masked_tokens(records, samples + 1) != whole).any()
    assert (masked_tokens(unmasked(tokens.astype(np.int64), lengths), samples) == whole).all(), "the dtype has no part"
    assert (masked_tokens(mask(records, rule), samples) == whole).all(), "earlier masks are removed"


def test_whole_words_are_masked_together(tokenizer):
    records = make_sequences(400)
    tokens, lengths = records.token_ids, records.lengths
    masked = mask(records, make_rule(tokenizer, whole_word=True))
    chosen = np.zeros(len(tokens), bool)
    chosen[masked.masked_lm_rows()] = True
    special = np.isin(tokens, [CLS, SEP])
    continues = ~tokenizer.word_start[tokens]
    joined = continues[1:] & ~special[:-1]  # a continuation after a special token is a word of its own
    assert (chosen[1:] == chosen[:-1])[joined].all()
    budget = np.minimum(20, np.maximum(1, np.rint(lengths * 0.15)))
    assert (masked.num_predictions <= budget).all()
    assert masked.num_predictions.sum() > 0.95 * budget[lengths > 10].sum()


def test_ngrams_have_the_lengths_that_were_drawn(tokenizer):
    """Runs of 1, 2, 3 in 6 : 3 : 2, but for the last of a sequence, cut by the budget, and for chance neighbours."""
    tokens = np.tile(np.array([CLS, *[7] * 998, SEP], np.uint16), 500)
    rule = make_rule(tokenizer, max_predictions=40)._replace(max_ngram=3, masked_lm_prob=0.04)
    masked = mask(unmasked(tokens, np.full(500, 1000)), rule)
    assert (masked.num_predictions == 40).all()
    gaps = np.diff(masked.masked_lm_positions) != 1
    runs = np.diff(np.flatnonzero(np.concatenate([[True], gaps, [True]])))
    shares = np.bincount(runs)[1:4] / len(runs)
    np.testing.assert_allclose(shares, [6 / 11, 3 / 11, 2 / 11], atol=0.04)
    assert (runs > 3).mean() < 0.07


def test_ngrams_of_whole_words_keep_words_and_budget(tokenizer):
    records = make_sequences(400)
    tokens, lengths = records.token_ids, records.lengths
    rule = make_rule(tokenizer, whole_word=True)
    masked = mask(records, rule._replace(max_ngram=3))
    chosen = np.zeros(len(tokens), bool)
    chosen[masked.masked_lm_rows()] = True
    special = np.isin(tokens, [CLS, SEP])
    joined = ~tokenizer.word_start[tokens][1:] & ~special[:-1]
    assert (chosen[1:] == chosen[:-1])[joined].all() and not chosen[special].any()
    assert (masked.num_predictions <= np.minimum(20, np.maximum(1, np.rint(lengths * 0.15)))).all()
    neighbours = [(np.diff(result.masked_lm_positions) == 1).mean() for result in (masked, mask(records, rule))]
    assert neighbours[0] > 1.2 * neighbours[1]


def test_a_sequence_without_ordinary_tokens_has_no_predictions(tokenizer):
    rule = make_rule(tokenizer)
    masked = mask(unmasked(np.array([CLS, SEP, CLS, 9, SEP]), [2, 3]), rule)
    assert (masked.num_predictions.tolist(), masked.masked_lm_positions.tolist()) == ([0, 1], [1])
    assert len(mask(unmasked(np.array([], np.uint16), np.array([], np.int64)), rule).token_ids) == 0


def test_golden_masks(tokenizer):
    masked = mask(make_sequences(100), make_rule(tokenizer))
    assert hashlib.sha256(masked.token_ids.astype("<u2").tobytes()).hexdigest()[:16] == "c459db371a0f29a3"
