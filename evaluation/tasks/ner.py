"""Named entities: a tag for each word (Devlin et al. 2019, section 5.3).

The first token of a word carries its label. A sentence that is too long is cut between words into consecutive windows,
so every word gets a tag. Scores count whole entities; seqeval computes them as CoNLL's official evaluation does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from seqeval.metrics import classification_report
from torch import Tensor

from data_prep.files import finished_file
from data_prep.text.tokenizer import Tokenizer
from evaluation.tasks.conll import Sentence, guess_scheme, read_conll, read_words
from evaluation.tasks.features import Features, progress
from evaluation.tasks.heads import BertForTokenClassification, token_loss
from evaluation.tasks.rows import find_split
from evaluation.tasks.task import Scores, Task

TRAIN_FILES = ("train.txt", "train.conll", "eng.train")
DEV_FILES = ("dev.txt", "valid.txt", "dev.conll", "eng.testa")


@dataclass(frozen=True)
class WordFeatures(Features):
    """N windows, each of one sentence. `labels` are [T], and -100 except at the first token of each word."""

    sentence_index: np.ndarray  # [N] int64
    is_word: np.ndarray  # [T] bool: whether a token is the first of its word


class Tagging(NamedTuple):
    """The predicted IOB2 tag of each word of a sentence, and its probability."""

    tags: list[str]
    probabilities: list[float]


def find_ner_task(data_dir: Path, train_file: str | None, dev_file: str | None, scheme: str | None) -> Task:
    """The task on a folder's files. The training file determines the types and, if `scheme` is None, the scheme.

    Raises ValueError for missing files, what `evaluation.tasks.conll` rejects, and a training file without entities.
    """
    train_file = train_file or find_split(data_dir, "train", TRAIN_FILES)
    dev_file = dev_file or find_split(data_dir, "dev", DEV_FILES)
    path = data_dir / train_file
    scheme = scheme or guess_scheme(read_words(path, True))
    types = {tag[2:] for sentence in read_conll(path, True, scheme) for tag in sentence.tags if tag != "O"}
    if not types:
        raise ValueError(f"{path}: every tag is O, so there is nothing to learn; is the tag in the last column?")
    labels = ["O", *(f"{prefix}-{kind}" for kind in sorted(types) for prefix in "BI")]
    return ner_task("ner", train_file, dev_file, scheme, labels)


def ner_task(name: str, train_file: str, dev_file: str, scheme: str, labels: Sequence[str]) -> Task:
    """Tagging with these IOB2 labels, on files of one scheme."""
    settings = {"name": name, "train_file": train_file, "dev_file": dev_file, "scheme": scheme, "labels": list(labels)}
    return Task(
        name=name,
        metrics=("f1", "precision", "recall"),
        train_file=train_file,
        dev_file=dev_file,
        labels=tuple(labels),
        num_outputs=len(labels),
        seq_length=128,
        settings=settings,
        read=partial(read_sentences, scheme=scheme, labels=labels),
        encode=partial(encode_words, labels=labels),
        features=WordFeatures,
        head=BertForTokenClassification,
        loss=token_loss,
        decode=partial(decode_tags, labels=labels),
        score=score_tags,
        write=write_tags,
    )


def read_sentences(path: Path, labelled: bool, scheme: str, labels: Sequence[str]) -> list[Sentence]:
    """The sentences of a file; ValueError, with the line, for a type of entity that the training file does not have."""
    sentences = read_conll(path, labelled, scheme)
    unknown = {tag[2:] for sentence in sentences for tag in sentence.tags or () if tag not in labels}
    if unknown:
        known = sorted({label[2:] for label in labels if label != "O"})
        line = next(word.line for words in read_words(path, True) for word in words if word.tag[2:] in unknown)
        raise ValueError(
            f"{path}:{line}: entities of type {', '.join(sorted(unknown))} are outside the task, whose training file "
            f"has {', '.join(known)}; correct the tags or add such entities to the training file"
        )
    return sentences


def encode_words(
    tokenizer: Tokenizer, sentences: Sequence[Sentence], seq_length: int, name: str, labels: Sequence[str]
) -> WordFeatures:
    """[CLS] words [SEP] for each window. A word without tokens becomes [UNK]; one longer than a window is cut to it."""
    budget = seq_length - 2
    index_of = {label: index for index, label in enumerate(labels)}
    sequences, targets, is_word, sentence_index = [], [], [], []
    for index, sentence in enumerate(progress(sentences, name)):
        words = [(tokenizer.encode(word) or [tokenizer.unk_id])[:budget] for word in sentence.words]
        classes = [index_of[tag] for tag in sentence.tags or ["O"] * len(words)]
        for start, stop in cut_between_words([len(tokens) for tokens in words], budget):
            ids, firsts, wanted = [tokenizer.cls_id], [False], [-100]
            for tokens, label in zip(words[start:stop], classes[start:stop], strict=True):
                ids += tokens
                firsts += [True] + [False] * (len(tokens) - 1)
                wanted += [label] + [-100] * (len(tokens) - 1)
            sequences.append(np.array([*ids, tokenizer.sep_id]))
            is_word.append([*firsts, False])
            targets.append([*wanted, -100])
            sentence_index.append(index)
    lengths = [len(sequence) for sequence in sequences]
    return WordFeatures(
        token_ids=np.concatenate(sequences),
        sequence_start=np.cumsum([0, *lengths]),
        segment_b_start=np.array(lengths),
        labels=None if sentences[0].tags is None else np.concatenate(targets).astype(np.int64),
        note=f"{len(sentences):,} sentences in {len(sequences):,} windows",
        sentence_index=np.array(sentence_index),
        is_word=np.concatenate(is_word),
    )


def cut_between_words(num_tokens: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """(first word, word after the last) of each window of at most `budget` tokens; `num_tokens` is for each word."""
    windows, start, room = [], 0, budget
    for index, count in enumerate(num_tokens):
        if count > room:
            windows.append((start, index))
            start, room = index, budget
        room -= count
    return [*windows, (start, len(num_tokens))]


def decode_tags(
    sentences: Sequence[Sentence], features: WordFeatures, logits: Sequence[Tensor], labels: Sequence[str]
) -> list[Tagging]:
    """The most probable tag of each word. logits: [S, L] of each window."""
    taggings = [Tagging([], []) for _ in sentences]
    for window, outputs in enumerate(logits):
        tokens = slice(features.sequence_start[window], features.sequence_start[window + 1])
        best = outputs[features.is_word[tokens]].softmax(-1).max(-1)  # of each word of the window
        tagging = taggings[features.sentence_index[window]]
        tagging.tags.extend(labels[index] for index in best.indices.tolist())
        tagging.probabilities.extend(best.values.tolist())
    return taggings


def score_tags(sentences: Sequence[Sentence], taggings: Sequence[Tagging]) -> Scores:
    """Precision, recall and F1 of entities, over all of them (micro-averaged) and for each type that occurs."""
    right, found = [list(sentence.tags) for sentence in sentences], [tagging.tags for tagging in taggings]
    report = classification_report(right, found, output_dict=True, zero_division=0)
    averages = {"macro avg", "weighted avg"}
    rows = {"": report.pop("micro avg")} | {f"{kind} ": row for kind, row in report.items() if kind not in averages}
    names = {"f1": "f1-score", "precision": "precision", "recall": "recall"}
    return {f"{kind}{name}": float(row[key]) for kind, row in rows.items() for name, key in names.items()}


def write_tags(folder: Path, sentences: Sequence[Sentence], taggings: Sequence[Tagging]) -> None:
    """predictions.txt: tab-separated word, tag (if known), prediction, probability; a blank line after a sentence."""
    with finished_file(folder / "predictions.txt", "w") as file:
        for sentence, tagging in zip(sentences, taggings, strict=True):
            columns = [sentence.words, *([sentence.tags] if sentence.tags else []), tagging.tags]
            for *values, probability in zip(*columns, tagging.probabilities, strict=True):
                file.write("\t".join([*values, f"{probability:.6g}"]) + "\n")
            file.write("\n")
