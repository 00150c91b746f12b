"""Masked language modelling: which tokens are hidden, and behind what (Devlin et al. 2018, section 3.1).

Of a sequence's tokens 15 % are predicted: 80 % of these become [MASK], 10 % stay as they are, 10 % become a random
token. Masks are a pure function of (seed, epoch, sample): the build stores those of epoch 0 in the shards, and a
loader that wants others each epoch calls the same function. Compiled, since it runs once for every token of every
duplicate.
"""

from typing import NamedTuple

import numpy as np

from data_prep.randomness import MASKING, below, compiled, start_stream, uniform

_SPECIAL, _BEGINS_UNIT, _CONTINUES_UNIT = 0, 1, 2


class MaskingRule(NamedTuple):
    """What `mask_sequences` needs to know; made by `masking_rule`.

    masked_lm_prob   share of a sequence's tokens (special ones count) to predict, at least one
    max_predictions  and at most so many
    max_ngram        longest run of units masked together; a run of n is drawn with a probability proportional to 1/n
                     (Lan et al. 2019, section 3.1)
    mask_id          id of [MASK]
    token_role       uint8 [V]: 0 special, never predicted and never the random replacement; 1 begins a unit that is
                     masked together (a word, or just itself); 2 continues one
    """

    masked_lm_prob: float
    max_predictions: int
    max_ngram: int
    mask_id: int
    token_role: np.ndarray


class Masked(NamedTuple):
    """Sequences with masks. P predictions in all, in the order of the tokens.

    token_ids            [T]  with the masks applied, of the dtype that came in
    num_predictions      int64 [B]
    masked_lm_positions  int64 [P]  inside the prediction's sequence
    masked_lm_labels     [P]  the tokens that were there, of the dtype of token_ids
    """

    token_ids: np.ndarray
    num_predictions: np.ndarray
    masked_lm_positions: np.ndarray
    masked_lm_labels: np.ndarray


def masking_rule(
    tokenizer, *, masked_lm_prob: float, max_predictions: int, whole_word: bool, max_ngram: int = 1
) -> MaskingRule:
    """The rule for a vocabulary (see data_prep.text.tokenizer).

    [PAD], [CLS], [SEP] and [MASK] are special; [UNK] stands for a word and is predicted like one, as in
    google-research/bert.
    """
    role = np.full(tokenizer.vocab_size, _BEGINS_UNIT, np.uint8)
    if whole_word:
        role[~tokenizer.word_start] = _CONTINUES_UNIT
    role[[tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]] = _SPECIAL
    return MaskingRule(masked_lm_prob, max_predictions, max_ngram, tokenizer.mask_id, role)


def mask_sequences(
    token_ids: np.ndarray,
    lengths: np.ndarray,
    samples: np.ndarray,
    rule: MaskingRule,
    *,
    seed: int,
    epoch: int | np.ndarray = 0,
) -> Masked:
    """Mask B sequences that lie one after another in `token_ids` [T], T = sum of `lengths` [B]; the input is left as
    it is.

    samples [B] are the numbers that name the sequences, their places in the shard folder; `epoch` may be one for each,
    [B]. A sequence gets round(masked_lm_prob * length) predictions, within [1, max_predictions] and what it has of
    ordinary tokens. Units that no longer fit are passed over, so whole words may give fewer.
    """
    sequence_start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    masked = np.array(token_ids)
    # A unit is kept whole or not at all, so no sequence exceeds its budget.
    max_total = int(np.sum(_budget(np.asarray(lengths), rule.masked_lm_prob, rule.max_predictions)))
    positions, labels = np.empty(max_total, np.int64), np.empty(max_total, masked.dtype)
    num_predictions = np.empty(len(sequence_start) - 1, np.int64)
    samples, epochs = np.asarray(samples), np.full(len(lengths), epoch, np.int64)
    total = _mask_sequences(masked, sequence_start, samples, rule, seed, epochs, num_predictions, positions, labels)
    return Masked(masked, num_predictions, positions[:total], labels[:total])


def _budget(lengths, masked_lm_prob, max_predictions):
    # rint rounds halves to even as Python's round does, which create_pretraining_data.py uses.
    return np.minimum(max_predictions, np.maximum(1, np.rint(lengths * masked_lm_prob).astype(np.int64)))


@compiled
def _mask_sequences(tokens, sequence_start, samples, rule, seed, epochs, num_predictions, positions, labels):
    """Mask `tokens` in place, fill the last three arrays and return the number of predictions."""
    stream = np.empty(1, np.uint64)
    longest = np.max(np.diff(sequence_start)) if len(samples) else 0
    units, chosen = np.empty(longest, np.int64), np.empty(longest, np.bool_)
    total = 0
    for i in range(len(samples)):
        sequence = tokens[sequence_start[i] : sequence_start[i + 1]]
        start_stream(stream, seed, MASKING, epochs[i], samples[i])
        budget = min(rule.max_predictions, max(1, np.int64(np.rint(len(sequence) * rule.masked_lm_prob))))
        num_units = _find_units(sequence, rule.token_role, units)
        _choose(sequence, rule.token_role, rule.max_ngram, units, num_units, budget, chosen, stream)
        before = total
        for position in range(len(sequence)):
            if chosen[position]:
                positions[total], labels[total] = position, sequence[position]
                _hide(sequence, position, rule, stream)
                total += 1
        num_predictions[i] = total - before
    return total


@compiled
def _find_units(sequence, token_role, units):
    """Write where each unit begins into `units` and return their number. A special token ends the unit before it."""
    num_units, before = 0, _SPECIAL
    for position in range(len(sequence)):
        role = token_role[sequence[position]]
        units[num_units] = position
        num_units += (role == _BEGINS_UNIT) | ((role == _CONTINUES_UNIT) & (before == _SPECIAL))
        before = role
    return num_units


@compiled
def _choose(sequence, token_role, max_ngram, units, num_units, budget, chosen, stream):
    """Go through the units in random order and take each that still fits the budget, with the units after it if an
    n-gram is drawn, as far as they fit; mark the positions in `chosen`.
    """
    chosen[: len(sequence)] = False
    for done in range(num_units):
        if budget == 0:
            return
        pick = done + below(stream, num_units - done)
        start = units[pick]
        units[pick] = units[done]
        num_wanted = _ngram_length(max_ngram, stream) if max_ngram > 1 else 1
        for _ in range(num_wanted):
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
    """1 .. max_ngram, each n with a probability proportional to 1/n."""
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
    draw = uniform(stream)
    if draw < 0.8:
        sequence[position] = rule.mask_id
    elif draw >= 0.9:
        token = below(stream, len(rule.token_role))
        while rule.token_role[token] == _SPECIAL:
            token = below(stream, len(rule.token_role))
        sequence[position] = token
