"""Named entities: a tag for each word, as a task for the loop (Devlin et al. 2019, section 5.3).

A word's first piece carries its label, the others none. A sentence of more tokens than fit is cut between words into
windows, one after another, so that no word goes without a tag. Scores are seqeval's, of whole entities: it gives what
CoNLL's own evaluation gives.
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
from evaluation.tasks.conll import Sentence, read_conll, read_words, tell_scheme
from evaluation.tasks.features import Features, progress
from evaluation.tasks.heads import BertForTokenClassification, token_loss
from evaluation.tasks.task import Scores, Task

USUAL_FILES = {
    "train": ("train.txt", "train.conll", "eng.train"),
    "dev": ("dev.txt", "valid.txt", "dev.conll", "eng.testa"),
}


@dataclass(frozen=True)
class WordFeatures(Features):
    """Sentences or windows of them; `labels` are [T], -100 but for the first piece of each word."""

    sentence_index: np.ndarray  # [N] int64
    is_word: np.ndarray  # [T] bool: the first piece of a word


class Tagging(NamedTuple):
    """The predicted IOB2 tag of each word of a sentence, and its probability."""

    tags: list[str]
    probabilities: list[float]


def find_ner_task(data_dir: Path, train_file: str | None, dev_file: str | None, scheme: str | None) -> Task:
    """The task that a folder's files make: scheme and types come from the training file. Raises ValueError for missing
    files, what `evaluation.tasks.conll` finds wrong, and a training file without an entity.
    """
    train_file = train_file or _usual_file(data_dir, "train")
    dev_file = dev_file or _usual_file(data_dir, "dev")
    path = data_dir / train_file
    scheme = scheme or tell_scheme(read_words(path, True))
    types = {tag[2:] for sentence in read_conll(path, True, scheme) for tag in sentence.tags if tag != "O"}
    if not types:
        raise ValueError(f"{path}: every tag is O; a training file has entities: is the tag in the last column?")
    labels = ["O", *(f"{prefix}-{kind}" for kind in sorted(types) for prefix in "BI")]
    return ner_task("ner", train_file, dev_file, scheme, labels)


def _usual_file(data_dir: Path, split: str) -> str:
    found = [name for name in USUAL_FILES[split] if (data_dir / name).is_file()]
    if len(found) == 1:
        return found[0]
    problem = f"holds {' and '.join(found)}" if found else f"holds none of {', '.join(USUAL_FILES[split])}"
    raise ValueError(f"{data_dir} {problem}; exactly one is due: name it with --{split}-file")


def ner_task(name: str, train_file: str, dev_file: str, scheme: str, labels: Sequence[str]) -> Task:
    """Tagging with these IOB2 labels, from files of one scheme."""
    settings = {"name": name, "train_file": train_file, "dev_file": dev_file, "scheme": scheme, "labels": list(labels)}
    return Task(
        name=name,
        metrics=("f1", "precision", "recall"),
        train_file=train_file,
        dev_file=dev_file,
        labels=tuple(labels),
        num_outputs=len(labels),
        max_seq_length=128,
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
    """The sentences of a file; ValueError, with the line, for a type of entity that the training file has not."""
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
    tokenizer: Tokenizer, sentences: Sequence[Sentence], max_seq_length: int, name: str, labels: Sequence[str]
) -> WordFeatures:
    """[CLS] words [SEP] for each sentence or window of one. A word that the vocabulary knows nothing of is [UNK]; one
    longer than a window loses the rest of its pieces.
    """
    budget = max_seq_length - 2
    index_of = {label: index for index, label in enumerate(labels)}
    sequences, targets, is_word, sentence_index = [], [], [], []
    for index, sentence in enumerate(progress(sentences, name)):
        words = [(tokenizer.encode(word) or [tokenizer.unk_id])[:budget] for word in sentence.words]
        classes = [index_of[tag] for tag in sentence.tags or ["O"] * len(words)]
        for start, stop in cut_between_words([len(pieces) for pieces in words], budget):
            ids, firsts, wanted = [tokenizer.cls_id], [False], [-100]
            for pieces, label in zip(words[start:stop], classes[start:stop], strict=True):
                ids += pieces
                firsts += [True] + [False] * (len(pieces) - 1)
                wanted += [label] + [-100] * (len(pieces) - 1)
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


def cut_between_words(num_pieces: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """(first word, word after the last) of each window; none has more than `budget` pieces."""
    windows, start, room = [], 0, budget
    for place, count in enumerate(num_pieces):
        if count > room:
            windows.append((start, place))
            start, room = place, budget
        room -= count
    return [*windows, (start, len(num_pieces))]


def decode_tags(
    sentences: Sequence[Sentence], features: WordFeatures, logits: Sequence[Tensor], labels: Sequence[str]
) -> list[Tagging]:
    """The likeliest tag of each word. logits: [S, L] of each window."""
    taggings = [Tagging([], []) for _ in sentences]
    for window, scores in enumerate(logits):
        places = slice(features.sequence_start[window], features.sequence_start[window + 1])
        best = scores[features.is_word[places]].softmax(-1).max(-1)  # of each word [words]
        tagging = taggings[features.sentence_index[window]]
        tagging.tags.extend(labels[index] for index in best.indices.tolist())
        tagging.probabilities.extend(best.values.tolist())
    return taggings


def score_tags(sentences: Sequence[Sentence], taggings: Sequence[Tagging]) -> Scores:
    """Precision, recall and F1 of entities, over all (micro-averaged) and of each type that occurs."""
    right, found = [list(sentence.tags) for sentence in sentences], [tagging.tags for tagging in taggings]
    report = classification_report(right, found, output_dict=True, zero_division=0)
    averages = {"macro avg", "weighted avg"}
    rows = {"": report.pop("micro avg")} | {f"{kind} ": row for kind, row in report.items() if kind not in averages}
    names = {"f1": "f1-score", "precision": "precision", "recall": "recall"}
    return {f"{kind}{name}": float(row[key]) for kind, row in rows.items() for name, key in names.items()}


def write_tags(folder: Path, sentences: Sequence[Sentence], taggings: Sequence[Tagging]) -> None:
    """predictions.txt: word, tag (if the file has them), predicted tag and its probability, by tabs; a blank line after
    each sentence.
    """
    with finished_file(folder / "predictions.txt", "w") as file:
        for sentence, tagging in zip(sentences, taggings, strict=True):
            columns = [sentence.words, *([sentence.tags] if sentence.tags else []), tagging.tags]
            for *values, probability in zip(*columns, tagging.probabilities, strict=True):
                file.write("\t".join([*values, f"{probability:.6g}"]) + "\n")
            file.write("\n")
