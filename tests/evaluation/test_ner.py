"""A folder as a task, windows in which every word has its tag, and entity scores by hand."""

import pytest
import torch

from data_prep.text.tokenizer import load_tokenizer
from evaluation.tasks.conll import read_conll
from evaluation.tasks.ner import Tagging, cut_between_words, find_ner_task, ner_task, score_tags

WORDS = ["John", "and", "Mary", "Ann", "saw", "New", "York"]
IOB2 = ["B-PER", "O", "B-PER", "I-PER", "O", "B-LOC", "I-LOC"]


def lines(tags, words=WORDS):
    return "".join(f"{word} {tag}\n" for word, tag in zip(words, tags, strict=True))


def write(folder, content, name="train.txt"):
    path = folder / name
    path.write_bytes(content.encode())
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    pieces = ["john", "and", "mary", "an", "##n", "saw", "new", "yo", "##rk"]
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]) + "\n", encoding="utf-8")
    return load_tokenizer(path)


def test_a_folder_that_is_not_a_task(tmp_path):
    with pytest.raises(ValueError, match="holds none of train.txt, .*--train-file"):
        find_ner_task(tmp_path, None, None, None)
    write(tmp_path, "a O\n")
    write(tmp_path, lines(IOB2), "dev.txt")
    with pytest.raises(ValueError, match="train.txt: every tag is O"):
        find_ner_task(tmp_path, None, None, None)
    write(tmp_path, lines(["B-PER"], ["John"]))
    task = find_ner_task(tmp_path, None, None, None)
    assert task.labels == ("O", "B-PER", "I-PER")
    with pytest.raises(ValueError, match="dev.txt:6: entities of type LOC are outside the task"):
        task.read(tmp_path / "dev.txt", True)
    with pytest.raises(ValueError, match="no.txt does not exist; the folder holds dev.txt, train.txt"):
        task.read(tmp_path / "no.txt", True)


@pytest.mark.parametrize("seq_length", [5, 6, 20])
def test_every_word_gets_a_tag(tmp_path, tokenizer, seq_length):
    """A model that predicts every label gives every tag back, however short the windows are."""
    write(tmp_path, lines(IOB2) + "\n" + lines(["B-LOC", "O"], ["\u200b", "yorkyorkrkrkrkrk"]))
    task = find_ner_task(tmp_path, None, "train.txt", None)
    sentences = task.read(tmp_path / "train.txt", True)
    features = task.encode(tokenizer, sentences, seq_length, "test")
    assert features.lengths.max() <= seq_length
    assert features.is_word.sum() == 9 and (features.labels != -100).sum() == 9
    perfect = torch.nn.functional.one_hot(torch.from_numpy(features.labels).clamp(min=0), len(task.labels)) * 10.0
    taggings = task.decode(sentences, features, list(perfect.split(features.lengths.tolist())))
    assert [tagging.tags for tagging in taggings] == [list(sentence.tags) for sentence in sentences]
    assert task.score(sentences, taggings)["f1"] == 1.0
    task.write(tmp_path, sentences, taggings)
    written = (tmp_path / "predictions.txt").read_text(encoding="utf-8").split("\n")
    assert written[0].split("\t")[:3] == ["John", "B-PER", "B-PER"] and float(written[0].split("\t")[3]) > 0.99
    assert written[7] == ""


def test_windows_end_between_words():
    assert cut_between_words([2, 2, 1, 3], 4) == [(0, 2), (2, 4)]
    assert cut_between_words([4, 4], 4) == [(0, 1), (1, 2)]
    assert cut_between_words([1], 4) == [(0, 1)]


def test_entity_scores_by_hand(tmp_path):
    path = write(tmp_path, lines(IOB2))
    (sentence,) = read_conll(path, True, "iob2")
    # Right: John, and New York. Mary Ann is found as Mary alone: a false one, and the right one is missed.
    found = Tagging(["B-PER", "O", "B-PER", "O", "O", "B-LOC", "I-LOC"], [1.0] * 7)
    scores = score_tags([sentence], [found])
    assert scores == {
        **{"f1": pytest.approx(2 / 3), "precision": pytest.approx(2 / 3), "recall": pytest.approx(2 / 3)},
        **{"LOC f1": 1.0, "LOC precision": 1.0, "LOC recall": 1.0},
        **{"PER f1": 0.5, "PER precision": 0.5, "PER recall": 0.5},
    }
    # An I- without a beginning is an entity, as in CoNLL's own evaluation.
    found = Tagging(["I-PER", "O", "O", "O", "O", "O", "O"], [1.0] * 7)
    scores = score_tags([sentence], [found])
    assert (scores["precision"], scores["recall"]) == (1.0, pytest.approx(1 / 3))
    nothing = score_tags([sentence], [Tagging(["O"] * 7, [1.0] * 7)])
    assert (nothing["f1"], nothing["LOC f1"]) == (0.0, 0.0)


def test_settings_make_the_same_task_again():
    task = ner_task("ner", "train.txt", "dev.txt", "bioes", ["O", "B-X", "I-X"])
    assert ner_task(**task.settings).settings == task.settings
