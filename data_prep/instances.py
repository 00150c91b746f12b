"""From tokenised documents to training instances: sentence pairs for next-sentence prediction (NSP) or sentence-order
prediction (SOP), or full sentences without a second segment.

An instance is one or two runs of consecutive corpus tokens, stored as bounds in 32 bytes until `assemble` copies the
tokens. The instances of a document are a pure function of (seed, duplicate, document) and the corpus.
"""

from typing import NamedTuple

import numpy as np

from data_prep.randomness import INSTANCES, below, compiled, next_bits, start_stream, uniform
from data_prep.shards import Records, starts_of

NO_PAIR, IN_ORDER, RANDOM_OR_SWAPPED = -1, 0, 1  # values of pair_label
PAIR_TASKS = {"nsp": 0, "sop": 1, "none": 2}
NUM_SPECIAL_TOKENS = {"nsp": 3, "sop": 3, "none": 2}  # [CLS] A [SEP] B [SEP] or [CLS] A [SEP]
_SOP, _NONE = PAIR_TASKS["sop"], PAIR_TASKS["none"]

# Segment A is the tokens a_start .. a_start + a_length - 1 of the corpus, and B likewise. Without a second segment,
# b_length is 0. `position` is the sequence's number in the shuffled folder, filled in by data_prep.build.
_FIELDS = {"position": "<i8", "a_start": "<i8", "b_start": "<i8", "a_length": "<u2", "b_length": "<u2"}
INSTANCE = np.dtype([*_FIELDS.items(), ("pair_label", "i1")], align=True)


class InstanceRule(NamedTuple):
    """How documents become instances. The values of pair_task:

    "nsp"   as create_pretraining_data.py of google-research/bert (Devlin et al. 2018, section 3.1)
    "sop"   the two segments of a chunk, swapped half the time (Lan et al. 2019, section 3.1). A chunk has at least two
            sentences; a document of one sentence gives no instance.
    "none"  as many whole sentences of one document as fit (Liu et al. 2019, section 4.2, DOC-SENTENCES). A longer
            sentence is cut, and no token is lost.
    """

    seq_length: int  # maximum number of tokens per sequence, special tokens included
    pair_task: str = "nsp"
    duplicates: int = 1  # passes over the corpus, each with different chunks and pairs
    short_seq_prob: float = 0.1  # share of the documents whose chunks are cut to a random shorter length
    seed: int = 0  # non-negative


def count_instances(
    sentence_start: np.ndarray, document_start: np.ndarray, documents: range, rule: InstanceRule
) -> int:
    """The number of instances that `make_instances` gives for the same arguments."""
    return _fill(np.empty(0, INSTANCE), sentence_start, document_start, documents, rule)


def make_instances(
    sentence_start: np.ndarray,
    document_start: np.ndarray,
    documents: range,
    rule: InstanceRule,
    num_instances: int | None = None,
) -> np.ndarray:
    """The instances of `documents`, of dtype INSTANCE, ordered by (duplicate, document, place in the document).

    sentence_start int64 [S + 1] in tokens and document_start int64 [D + 1] in sentences describe the WHOLE corpus
    without empty sentences and documents (see `drop_empty`), because NSP draws random next sentences from all of it.
    NSP needs D >= 2. `num_instances` is the result of `count_instances`, if the caller already has it.
    """
    if num_instances is None:  # counting is cheap: two passes beat an array that grows
        num_instances = count_instances(sentence_start, document_start, documents, rule)
    instances = np.zeros(num_instances, INSTANCE)
    _fill(instances, sentence_start, document_start, documents, rule)
    return instances


def _fill(out, sentence_start, document_start, documents, rule):
    return _make_instances(
        np.asarray(sentence_start),
        np.asarray(document_start),
        documents.start,
        documents.stop,
        rule.duplicates,
        rule.seed,
        PAIR_TASKS[rule.pair_task],
        rule.seq_length - NUM_SPECIAL_TOKENS[rule.pair_task],
        rule.short_seq_prob,
        out,
    )


def check_size(num_sentences: np.ndarray, pair_task: str) -> None:
    """Raise ValueError if D documents with `num_sentences` int64 [D] sentences give no instance at all."""
    if len(num_sentences) == 0:
        raise ValueError("the corpus has no text; run `python -m data_prep.corpus` on files that contain text")
    if pair_task == "nsp" and len(num_sentences) < 2:
        raise ValueError(
            "pair_task=nsp takes random next sentences from another document, so it needs 2 documents, and the corpus "
            "has 1; split it into documents or choose --pair-task sop or none"
        )
    if pair_task == "sop" and num_sentences.max() < 2:
        raise ValueError(
            "pair_task=sop needs documents of at least two sentences and the corpus has none; "
            "split it into sentences or choose --pair-task none"
        )


def total(instances: np.ndarray) -> np.ndarray:
    """int64 [3]: the numbers of instances, of random or swapped second segments, and of tokens in the instances."""
    num_tokens = instances["a_length"].sum(dtype=np.int64) + instances["b_length"].sum(dtype=np.int64)
    return np.array([len(instances), (instances["pair_label"] == RANDOM_OR_SWAPPED).sum(), num_tokens])


def doubt_about_sentences(
    totals: np.ndarray, sentence_start: np.ndarray, document_start: np.ndarray, rule: InstanceRule
) -> str:
    """A warning if the bounds of sentences or documents look wrong, else "". `totals` sums `total` over the corpus."""
    num_instances, num_random, num_tokens = map(int, totals)
    share_in_sequences = num_tokens / (rule.duplicates * int(sentence_start[-1]))
    # Usually 50 % to 70 % of the pairs are random and at least 90 % of the text is in a sequence.
    found = []
    if rule.pair_task == "nsp" and num_random > 0.9 * num_instances:
        found.append(f"{num_random / num_instances:.0%} of the pairs have a random second segment, where half is usual")
    if share_in_sequences < 0.7:
        found.append(f"{1 - share_in_sequences:.0%} of the text is in no sequence")
    if not found:
        return ""
    num_sentences, num_documents = len(sentence_start) - 1, len(document_start) - 1
    return (
        f"{' and '.join(found)}; a document has {num_sentences / num_documents:.1f} sentences on average, and a "
        f"sentence {int(sentence_start[-1]) / num_sentences:.0f} tokens. Check where sentences and documents end "
        "(with --format sentences a blank line ends a document), or choose --pair-task none, which needs no sentences"
    )


def drop_empty(sentence_start: np.ndarray, document_start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sentence_start, document_start) without empty sentences and documents; token positions do not change."""
    has_tokens = np.diff(sentence_start) > 0
    num_kept_before = np.concatenate([[0], np.cumsum(has_tokens)])
    sentence_start = np.append(sentence_start[:-1][has_tokens], sentence_start[-1:])
    return sentence_start, np.unique(num_kept_before[document_start])


def assemble(token_ids: np.ndarray, instances: np.ndarray, *, cls_id: int, sep_id: int, dtype: np.dtype) -> Records:
    """Unmasked sequences, [CLS] A [SEP] B [SEP] or [CLS] A [SEP], of `dtype`; `token_ids` are the whole corpus's."""
    segment_b_start = instances["a_length"].astype(np.int64) + 2
    b_length = instances["b_length"].astype(np.int64)
    sequence_start = starts_of(np.where(b_length > 0, segment_b_start + b_length + 1, segment_b_start))
    tokens = np.empty(sequence_start[-1], dtype)
    _assemble(np.asarray(token_ids), instances, cls_id, sep_id, tokens)
    return Records(
        sequence_start=sequence_start,
        prediction_start=np.zeros(len(sequence_start), np.int64),
        token_ids=tokens,
        masked_lm_labels=np.empty(0, dtype),
        masked_lm_positions=np.empty(0, np.int64),
        segment_b_start=segment_b_start,
        pair_labels=instances["pair_label"],
    )


@compiled
def _make_instances(
    sentence_start, document_start, first, last, duplicates, seed, pair_task, max_tokens, short_seq_prob, out
):
    """Write as many instances as fit into `out`, and return the number of all instances."""
    stream = np.empty(1, np.uint64)
    num_instances = 0
    for duplicate in range(duplicates):
        for document in range(first, last):
            start_stream(stream, seed, INSTANCES, duplicate, document)
            # Drawn once per document, as in create_pretraining_data.py.
            target = 2 + below(stream, max_tokens - 1) if uniform(stream) < short_seq_prob else max_tokens
            if pair_task == _NONE:
                num_instances = _full_sentences(
                    sentence_start, document_start[document], document_start[document + 1], target, out, num_instances
                )
            else:
                num_instances = _sentence_pairs(
                    sentence_start, document_start, document, stream, pair_task, target, max_tokens, out, num_instances
                )
    return num_instances


@compiled
def _sentence_pairs(
    sentence_start, document_start, document, stream, pair_task, target, max_tokens, out, num_instances
):
    """Cut a document into chunks of at least `target` tokens, and each chunk between two sentences into A and B."""
    begin, end = document_start[document], document_start[document + 1]
    min_sentences = 2 if pair_task == _SOP else 1
    if end - begin < min_sentences:
        return num_instances
    first = begin
    while first < end:
        last = first + 1
        while last < end and (sentence_start[last] - sentence_start[first] < target or last - first < min_sentences):
            last += 1
        # In SOP, a single sentence left at the end of a document is paired with the one before it.
        first = min(first, last - min_sentences)
        split = first + 1 + (below(stream, last - first - 1) if last - first > 1 else 0)
        a_start, a_end = sentence_start[first], sentence_start[split]
        b_start, b_end = a_end, sentence_start[last]
        is_swapped = pair_task == _SOP and uniform(stream) < 0.5
        is_random = pair_task != _SOP and (last - first == 1 or uniform(stream) < 0.5)
        if is_random:
            b_start, b_end = _random_next(sentence_start, document_start, document, stream, target - (a_end - a_start))
            last = split  # the unused sentences stay for the next chunk
        first = last
        a_start, a_end, b_start, b_end = _truncate(a_start, a_end, b_start, b_end, max_tokens, stream)
        if is_swapped:
            a_start, a_end, b_start, b_end = b_start, b_end, a_start, a_end
        label = RANDOM_OR_SWAPPED if is_random or is_swapped else IN_ORDER
        _store(out, num_instances, a_start, a_end, b_start, b_end, label)
        num_instances += 1
    return num_instances


@compiled
def _random_next(sentence_start, document_start, document, stream, num_tokens):
    """Bounds of a run of sentences of another document: from a random one to `num_tokens` tokens or the end."""
    other = below(stream, len(document_start) - 2)
    if other >= document:
        other += 1
    begin, end = document_start[other], document_start[other + 1]
    first = begin + below(stream, end - begin)
    last = first + 1
    while last < end and sentence_start[last] - sentence_start[first] < num_tokens:
        last += 1
    return sentence_start[first], sentence_start[last]


@compiled
def _truncate(a_start, a_end, b_start, b_end, max_tokens, stream):
    """Drop single tokens from the longer segment (from B in a tie) until both fit. A coin flip chooses the first or
    the last token each time. The final lengths do not depend on the coins, so counting the heads is enough.
    """
    num_a, num_b = a_end - a_start, b_end - b_start
    keep_a = min(num_a, max(max_tokens - num_b, max_tokens - max_tokens // 2))
    keep_b = min(num_b, max(max_tokens - num_a, max_tokens // 2))
    a_start += _num_heads(num_a - keep_a, stream)
    b_start += _num_heads(num_b - keep_b, stream)
    return a_start, a_start + keep_a, b_start, b_start + keep_b


@compiled
def _num_heads(num_flips, stream):
    """The number of heads in `num_flips` flips of a fair coin, 64 flips per random number."""
    num_heads = 0
    for done in range(0, num_flips, 64):
        bits = next_bits(stream)
        for _ in range(min(64, num_flips - done)):
            num_heads += np.int64(bits & np.uint64(1))
            bits >>= np.uint64(1)
    return num_heads


@compiled
def _full_sentences(sentence_start, begin, end, target, out, num_instances):
    """Pack the sentences begin..end-1 into runs of at most `target` tokens."""
    first, token = begin, sentence_start[begin]
    while first < end:
        while first < end and sentence_start[first + 1] - token <= target:
            first += 1
        stop = sentence_start[first]
        if stop <= token:  # what is left of this sentence is longer than a sequence
            stop = token + target
        _store(out, num_instances, token, stop, 0, 0, NO_PAIR)
        num_instances += 1
        token = stop
    return num_instances


@compiled
def _store(out, index, a_start, a_end, b_start, b_end, label):
    """Write instance number `index`, unless `out` is too short: `count_instances` passes an empty one."""
    if index < len(out):
        instance = out[index]
        instance.a_start, instance.a_length = a_start, a_end - a_start
        instance.b_start, instance.b_length = b_start, b_end - b_start
        instance.pair_label = label


@compiled
def _assemble(token_ids, instances, cls_id, sep_id, tokens):
    at = 0
    for i in range(len(instances)):
        instance = instances[i]
        tokens[at] = cls_id
        at = _copy(token_ids, instance.a_start, np.int64(instance.a_length), tokens, at + 1)
        tokens[at] = sep_id
        at += 1
        if instance.b_length > 0:
            at = _copy(token_ids, instance.b_start, np.int64(instance.b_length), tokens, at)
            tokens[at] = sep_id
            at += 1


@compiled
def _copy(token_ids, start, length, tokens, at):
    for offset in range(length):
        tokens[at + offset] = token_ids[start + offset]
    return at + length
