"""Masked language modelling: which tokens are predicted, and what replaces them (Devlin et al. 2018, section 3.1).

By default 15 % of a sequence's tokens are predicted (`--masked-lm-prob` of data_prep.build). Of these, 80 % become
[MASK], 10 % become a random token and 10 % do not change. Masks are a pure function of (seed,
epoch, sample): the build stores those of epoch 0 in the shards, and a loader with dynamic masks calls the same function
in every epoch.
"""

from typing import NamedTuple

import numpy as np

from data_prep.randomness import MASKING, below, compiled, start_stream, uniform
from data_prep.shards import Records
from data_prep.text.tokenizer import Tokenizer

_SPECIAL, _BEGINS_UNIT, _CONTINUES_UNIT = 0, 1, 2  # values of token_role


class MaskingRule(NamedTuple):
    """How sequences are masked; made by `masking_rule`.

    A unit is a word or a single token, and is masked as a whole. Runs of n units are masked with a probability
    proportional to 1/n (Lan et al. 2019, section 3.1).
    """

    masked_lm_prob: float  # share of a sequence's tokens to predict, special tokens included
    max_predictions: int  # per sequence
    max_ngram: int  # longest run of units
    mask_id: int  # of [MASK]
    token_role: np.ndarray  # uint8 [V]; a special token is neither predicted nor a random replacement


def masking_rule(
    tokenizer: Tokenizer, *, masked_lm_prob: float, max_predictions: int, whole_word: bool, max_ngram: int = 1
) -> MaskingRule:
    """The rule for a vocabulary. [UNK] is predicted like the word that it replaces, as in google-research/bert."""
    role = np.full(tokenizer.vocab_size, _BEGINS_UNIT, np.uint8)
    if whole_word:
        role[~tokenizer.word_start] = _CONTINUES_UNIT
    role[[tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]] = _SPECIAL
    return MaskingRule(masked_lm_prob, max_predictions, max_ngram, tokenizer.mask_id, role)


def mask_sequences(
    records: Records, samples: np.ndarray, rule: MaskingRule, *, seed: int, epoch: int | np.ndarray = 0
) -> Records:
    """B sequences with new masks in place of those of `records`, which is not changed.

    `samples` [B] are the sequences' numbers in the shard folder, `epoch` is one number or [B]. A sequence gets
    round(masked_lm_prob * length) predictions, but at least 1, at most max_predictions, and at most as many as it has
    ordinary tokens. A unit that exceeds the rest of this budget is skipped, so whole words may give fewer predictions.
    """
    token_ids = records.original_token_ids()
    # rint rounds halves to even, as Python's round in create_pretraining_data.py does.
    num_wanted = np.rint(records.lengths * rule.masked_lm_prob).astype(np.int64)
    budgets = np.minimum(rule.max_predictions, np.maximum(1, num_wanted))
    epochs = np.full(len(budgets), epoch, np.int64)
    prediction_start, labels, positions = _mask_sequences(
        token_ids, records.sequence_start, np.asarray(samples), epochs, budgets, rule, seed
    )
    return records._replace(
        token_ids=token_ids,
        prediction_start=prediction_start,
        masked_lm_labels=labels,
        masked_lm_positions=positions,
    )


@compiled
def _mask_sequences(tokens, sequence_start, samples, epochs, budgets, rule, seed):
    """Mask `tokens` in place; returns prediction_start [B + 1], masked_lm_labels [P] and masked_lm_positions [P]."""
    stream = np.empty(1, np.uint64)
    longest = np.max(np.diff(sequence_start)) if len(samples) else 0
    units, chosen = np.empty(longest, np.int64), np.empty(longest, np.bool_)
    prediction_start = np.zeros(len(samples) + 1, np.int64)
    labels, positions = np.empty(np.sum(budgets), tokens.dtype), np.empty(np.sum(budgets), np.int64)
    total = 0
    for i in range(len(samples)):
        sequence = tokens[sequence_start[i] : sequence_start[i + 1]]
        start_stream(stream, seed, MASKING, epochs[i], samples[i])
        num_units = _find_units(sequence, rule.token_role, units)
        _choose(sequence, rule.token_role, rule.max_ngram, units, num_units, budgets[i], chosen, stream)
        for position in range(len(sequence)):
            if chosen[position]:
                labels[total], positions[total] = sequence[position], position
                _hide(sequence, position, rule, stream)
                total += 1
        prediction_start[i + 1] = total
    return prediction_start, labels[:total], positions[:total]


@compiled
def _find_units(sequence, token_role, units):
    """Write the first position of each unit to `units` and return their number. A special token ends a unit."""
    num_units, before = 0, _SPECIAL
    for position in range(len(sequence)):
        role = token_role[sequence[position]]
        if role == _BEGINS_UNIT or (role == _CONTINUES_UNIT and before == _SPECIAL):
            units[num_units] = position
            num_units += 1
        before = role
    return num_units


@compiled
def _choose(sequence, token_role, max_ngram, units, num_units, budget, chosen, stream):
    """Visit the units in random order, each as the start of an n-gram. Mark in `chosen` what fits the budget."""
    chosen[: len(sequence)] = False
    for done in range(num_units):
        if budget == 0:
            return
        pick = done + below(stream, num_units - done)
        start = units[pick]
        units[pick] = units[done]
        for _ in range(_ngram_length(max_ngram, stream)):
            if start == len(sequence) or chosen[start] or token_role[sequence[start]] == _SPECIAL:
                break
            end = start + 1
            while end < len(sequence) and token_role[sequence[end]] == _CONTINUES_UNIT:
                end += 1
            if end - start > budget:
                break
            budget -= end - start
            chosen[start:end] = True
            start = end


@compiled
def _ngram_length(max_ngram, stream):
    """n from 1 to max_ngram, with a probability proportional to 1/n. No random number is drawn if max_ngram is 1."""
    if max_ngram == 1:
        return 1
    total = 0.0
    for n in range(1, max_ngram + 1):
        total += 1.0 / n
    draw = uniform(stream) * total
    for n in range(1, max_ngram):
        draw -= 1.0 / n
        if draw < 0:
            return n
    return max_ngram


@compiled
def _hide(sequence, position, rule, stream):
    """Replace a predicted token by [MASK] (80 %) or by a random ordinary token (10 %), or keep it."""
    draw = uniform(stream)
    if draw < 0.8:
        sequence[position] = rule.mask_id
    elif draw >= 0.9:
        token = below(stream, len(rule.token_role))
        while rule.token_role[token] == _SPECIAL:
            token = below(stream, len(rule.token_role))
        sequence[position] = token
