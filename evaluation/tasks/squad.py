"""SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, 2018): the official JSON, windows of a passage, and the task.

    {"data": [{"title": ..., "paragraphs": [{"context": "...", "qas": [
        {"id": "...", "question": "...", "is_impossible": false, "answers": [{"text": "...", "answer_start": 7}]}]}]}]}

`answer_start` counts characters. No question is left out silently: an answer that is not at its `answer_start`, and in
SQuAD 1.1 a question without an answer, are errors that name the question.

A passage that is too long is read in overlapping windows, by default as in google-research/bert's run_squad.py:
sequences of 384 tokens, a new window every 128 tokens, and questions of at most 64 tokens. In a window without the
answer, [CLS] is labelled as the answer's first and last token, which means that there is no answer.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.text.tokenizer import Tokenizer
from evaluation.tasks.features import Features, progress
from evaluation.tasks.heads import BertForQuestionAnswering, span_loss
from evaluation.tasks.rows import check_text, read_utf8
from evaluation.tasks.squad_answers import decode_answers, score_answers, write_answers
from evaluation.tasks.task import Task

SQUAD_TASKS = {"squad1": 1, "squad2": 2}
FILES = {1: ("train-v1.1.json", "dev-v1.1.json"), 2: ("train-v2.0.json", "dev-v2.0.json")}
KINDS = {str: "a text", bool: "true or false", int: "an integer", list: "a list"}
SHAPE = '{"data": [{"paragraphs": [{"context", "qas": [{"id", "question", "answers": [{"text", "answer_start"}]}]}]}]}'


class Question(NamedTuple):
    """One question on a passage. `answers` are all right answers: () if there is none, None in a file without answers.
    The first one begins at the character `answer_start` of `context`.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...] | None
    answer_start: int | None


@dataclass(frozen=True)
class SpanFeatures(Features):
    """N windows, each of one question. `labels` are [N, 2], and (0, 0) for no answer."""

    question_index: np.ndarray  # [N] int64
    spans: np.ndarray  # [T, 2] int64, first character of a token in the passage and the next after it; -1 outside
    may_begin: np.ndarray  # [T] bool: an answer may begin here, since no other window has more context around the token


def squad_task(
    name: str,
    train_file: str | None = None,
    dev_file: str | None = None,
    doc_stride: int = 128,
    max_query_length: int = 64,
    max_answer_length: int = 30,
    null_threshold: float | None = None,
) -> Task:
    """SQuAD 1.1 or 2.0. If `null_threshold` is None, SQuAD 2.0 tunes it on the questions that are scored."""
    version = SQUAD_TASKS[name]
    files = {"train_file": train_file or FILES[version][0], "dev_file": dev_file or FILES[version][1]}
    lengths = {"doc_stride": doc_stride, "max_query_length": max_query_length, "max_answer_length": max_answer_length}
    return Task(
        name=name,
        metrics=("f1", "exact"),
        **files,
        labels=(),
        num_outputs=2,
        seq_length=384,
        settings={"name": name, **files, **lengths},
        read=partial(read_squad, version=version),
        encode=partial(encode_windows, **lengths),
        features=SpanFeatures,
        head=BertForQuestionAnswering,
        loss=span_loss,
        decode=partial(decode_answers, max_answer_length=max_answer_length, with_null=version == 2),
        score=partial(score_answers, version=version, null_threshold=null_threshold),
        write=partial(write_answers, version=version, null_threshold=null_threshold),
    )


def read_squad(path: Path, labelled: bool, version: int) -> list[Question]:
    """Read all questions of a file in the official format.

    Raises ValueError, with the place in the file or the question's id, for a missing field or one of another type, an
    answer that is not at its `answer_start`, an id that occurs twice, a question without an answer in SQuAD 1.1, and a
    file without questions.
    """
    questions: list[Question] = []
    for place, context, record in _records(path):
        identity, question = _field(place, record, "id", str), _field(place, record, "question", str)
        if not labelled:
            questions.append(Question(identity, question, context, None, None))
            continue
        named = f"{path}: question {identity}"
        answers = _answers(place, named, context, record)
        if version == 1 and not answers:
            raise ValueError(f"{named} has no answer; SQuAD 1.1 has one for each: use --task squad2 or remove it")
        texts, starts = tuple(text for text, _ in answers), [start for _, start in answers]
        questions.append(Question(identity, question, context, texts, starts[0] if starts else None))
    if not questions:
        raise ValueError(f"{path} holds no questions; SQuAD's format is {SHAPE}")
    identity, count = Counter(question.id for question in questions).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{path}: question {identity} occurs {count} times; ids tell answers apart: make them unique")
    return questions


def _records(path: Path) -> Iterator[tuple[str, str, object]]:
    """(place in the file, context, JSON) of each question."""
    text = read_utf8(path, (".json",))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again, or correct it") from error
    for i, article in enumerate(_field(f"{path}: the file", content, "data", list)):
        for j, paragraph in enumerate(_field(f"{path}: data[{i}]", article, "paragraphs", list)):
            place = f"{path}: data[{i}].paragraphs[{j}]"
            context = _field(place, paragraph, "context", str)
            for k, record in enumerate(_field(place, paragraph, "qas", list)):
                yield f"{place}.qas[{k}]", context, record


def _field(place: str, record: object, key: str, kind: type):
    """record[key], which must be of this kind."""
    if not isinstance(record, dict) or key not in record:
        raise ValueError(f"{place} has no '{key}'; SQuAD's format is {SHAPE}")
    if type(record[key]) is not kind:
        raise ValueError(f"{place}: '{key}' is {json.dumps(record[key])[:60]} instead of {KINDS[kind]}")
    return check_text(place, key, record[key]) if kind is str else record[key]


def _answers(place: str, named: str, context: str, record: dict) -> list[tuple[str, int]]:
    """(text, start) of each answer, checked against the passage and without white space around the text."""
    if "is_impossible" in record and _field(place, record, "is_impossible", bool):
        return []
    found = []
    for index, answer in enumerate(_field(place, record, "answers", list)):
        inside = f"{place}.answers[{index}]"
        text, start = _field(inside, answer, "text", str), _field(inside, answer, "answer_start", int)
        there = context[start : start + len(text)] if start >= 0 else ""
        if there != text or not text.strip():
            raise ValueError(
                f"{named}: the passage has {there!r} at answer_start {start}, not the answer {text!r}; correct the "
                "number (of characters from 0) or remove the question"
            )
        found.append((text.strip(), start + len(text) - len(text.lstrip())))
    return found


def window_starts(num_tokens: int, budget: int, stride: int) -> list[tuple[int, int]]:
    """(first token, number of tokens) of each window of a passage: a new one every `stride` tokens until the end."""
    windows = [(0, min(num_tokens, budget))]
    while sum(windows[-1]) < num_tokens:
        start = windows[-1][0] + min(stride, budget)
        windows.append((start, min(num_tokens - start, budget)))
    return windows


def widest_context(windows: Sequence[tuple[int, int]], num_tokens: int) -> np.ndarray:
    """[num_tokens] The window with the most context of each token: the fewer of the tokens before it and after it.
    On a tie the longer window wins, as in `_check_is_max_context` of google-research/bert's run_squad.py.
    """
    tokens, context = np.arange(num_tokens), np.full((len(windows), num_tokens), -1.0)
    for number, (start, length) in enumerate(windows):
        inside = slice(start, start + length)
        before, after = tokens[inside] - start, start + length - 1 - tokens[inside]
        context[number, inside] = np.minimum(before, after) + 0.01 * length
    return np.argmax(context, axis=0)


def encode_windows(
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    seq_length: int,
    name: str,
    doc_stride: int,
    max_query_length: int,
    max_answer_length: int,
) -> SpanFeatures:
    """[CLS] question [SEP] part of the passage [SEP] for each window of each question."""
    sequences, segment_b_start, labels, question_index, spans, may_begin = [], [], [], [], [], []
    passage, ids, offsets, unreachable, num_cut = None, [], None, Counter(), 0
    for index, question in enumerate(progress(questions, name)):
        if question.context is not passage:  # questions on one passage are adjacent
            passage = question.context
            ids, characters = tokenizer.encode_with_offsets(passage)
            offsets = np.array(characters, np.int64).reshape(-1, 2)
        query = tokenizer.encode(question.question)
        if len(query) > max_query_length:
            num_cut += 1
        head = [tokenizer.cls_id, *query[:max_query_length], tokenizer.sep_id]
        windows = window_starts(len(ids), seq_length - len(head) - 1, doc_stride)
        owner = widest_context(windows, len(ids))
        first, last = gold_tokens(question, offsets)
        unreachable[why_unreachable(question, offsets, first, last, max_answer_length)] += 1
        for number, (start, length) in enumerate(windows):
            tokens, outside = slice(start, start + length), (len(head), 1)
            sequences.append(np.array([*head, *ids[tokens], tokenizer.sep_id]))
            segment_b_start.append(len(head))
            spans.append(np.pad(offsets[tokens], (outside, (0, 0)), constant_values=-1))
            may_begin.append(np.pad(owner[tokens] == number, outside))
            has_answer = start <= first and last < start + length
            labels.append((first - start + len(head), last - start + len(head)) if has_answer else (0, 0))
            question_index.append(index)
    note = [f"{len(questions):,} questions in {len(sequences):,} windows"]
    if num_cut:
        note.append(f"{num_cut:,} questions cut to {max_query_length} tokens")
    note += [f"{count:,} answers {reason}, so not predictable" for reason, count in unreachable.items() if reason]
    return SpanFeatures(
        token_ids=np.concatenate(sequences),
        sequence_start=np.cumsum([0, *map(len, sequences)]),
        segment_b_start=np.array(segment_b_start),
        labels=None if questions[0].answers is None else np.array(labels, np.int64),
        note=", ".join(note),
        question_index=np.array(question_index),
        spans=np.concatenate(spans),
        may_begin=np.concatenate(may_begin),
    )


def gold_tokens(question: Question, offsets: np.ndarray) -> tuple[int, int]:
    """First and last token of the first right answer in the passage; (-1, -1) if there is none."""
    if not question.answers:
        return -1, -1
    begin, end = question.answer_start, question.answer_start + len(question.answers[0])
    inside = np.flatnonzero((offsets[:, 1] > begin) & (offsets[:, 0] < end))
    return (int(inside[0]), int(inside[-1])) if len(inside) else (-1, -1)


def why_unreachable(question: Question, offsets: np.ndarray, first: int, last: int, max_answer_length: int) -> str:
    """Why no span of tokens is exactly the first right answer; "" if one is, or if there is no answer."""
    if not question.answers:
        return ""
    if first < 0:
        return "made of characters that the vocabulary drops"
    begin, end = question.answer_start, question.answer_start + len(question.answers[0])
    if (offsets[first, 0], offsets[last, 1]) != (begin, end):
        return "beginning or ending inside a token"
    return f"of more than {max_answer_length} tokens" if last - first >= max_answer_length else ""
