"""CoNLL files in three schemes, windows in which every word has its tag, and entity scores by hand."""

from pathlib import Path

import pytest
import torch

from data_prep.text.tokenizer import load_tokenizer
from evaluation.tasks.conll import guess_scheme, read_conll, read_words
from evaluation.tasks.ner import Tagging, cut_between_words, find_ner_task, ner_task, score_tags

CONLL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "ner" / "conll2003"
WORDS = ["John", "and", "Mary", "Ann", "saw", "New", "York"]
IOB2 = ["B-PER", "O", "B-PER", "I-PER", "O", "B-LOC", "I-LOC"]
SCHEMES = {
    "iob1": ["I-PER", "O", "I-PER", "I-PER", "O", "I-LOC", "I-LOC"],
    "iob2": IOB2,
    "bioes": ["S-PER", "O", "B-PER", "E-PER", "O", "B-LOC", "E-LOC"],
}


def lines(tags, words=WORDS, separator=" "):
    return "".join(f"{word}{separator}{tag}\n" for word, tag in zip(words, tags, strict=True))


def write(folder, content, name="train.txt"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    pieces = ["john", "and", "mary", "an", "##n", "saw", "new", "yo", "##rk"]
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]) + "\n", encoding="utf-8")
    return load_tokenizer(path)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_recognised_and_read_as_iob2(tmp_path, scheme):
    path = write(tmp_path, lines(SCHEMES[scheme]))
    assert guess_scheme(read_words(path, True)) == scheme
    (sentence,) = read_conll(path, True, scheme)
    assert (list(sentence.words), list(sentence.tags)) == (WORDS, IOB2)


def test_neighbours_of_one_type_in_each_scheme(tmp_path):
    expected = ("B-PER", "B-PER", "I-PER", "B-LOC", "B-LOC")
    for scheme, tags in {
        "iob1": "I-PER B-PER I-PER I-LOC B-LOC",
        "iob2": "B-PER B-PER I-PER B-LOC B-LOC",
        "bioes": "S-PER B-PER E-PER S-LOC S-LOC",
    }.items():
        path = write(tmp_path, lines(tags.split(), WORDS[:5]))
        assert read_conll(path, True, scheme)[0].tags == expected


def test_documents_columns_separators_and_line_ends(tmp_path):
    content = "\ufeff-DOCSTART- -X- O O\r\n\r\nEU NNP I-NP I-ORG\r\n\r\n \r\n-DOCSTART- -X- O O\r\nhe\tPRP\tI-NP\tO"
    assert read_conll(write(tmp_path, content), True, "iob1") == [(("EU",), ("B-ORG",)), (("he",), ("O",))]
    # Words may hold what other alphabets take for a space.
    path = write(tmp_path, "10\u00a0000\nwords\n\nmore\n")
    assert read_conll(path, False, "iob2") == [(("10\u00a0000", "words"), None), (("more",), None)]


@pytest.mark.parametrize(
    ("content", "scheme", "message"),
    [
        ("", "iob2", "train.txt holds no word"),
        ("-DOCSTART- O\n\n", "iob2", "holds no word"),
        ("a O\nb\n", "iob2", r"train.txt:2: 'b' has no tag"),
        ("a NN O\n\nb O\n", "iob2", r"train.txt:3: 2 columns where the first line has 3: 'b O'"),
        ("a PER\n", "iob2", r"train.txt:1: 'PER' is not a tag; write O, or B-, I-"),
        ("a B-\n", "iob2", r"'B-' is not a tag"),
        (b"a O\n\xff O\n", "iob2", r"train.txt:2: byte 0xff is not UTF-8"),
        ("a B-PER\nb I-LOC\n", "iob2", r"train.txt:2: I-LOC between B-PER and O is not IOB2; .*--tag-scheme iob1 or"),
        ("a O\nb I-LOC\n", "iob2", r"train.txt:2: I-LOC between O and O is not IOB2"),
        ("a O\rb O\r", "iob2", r"train.txt:1: a carriage return inside a line"),
        ("a S-PER\n", "iob1", r"train.txt:1: S-PER between O and O is not IOB1"),
        ("a B-PER\nb O\n", "bioes", r"train.txt:1: B-PER between O and O is not BIOES"),
        ("a B-PER\n\nb E-PER\n", "bioes", r"train.txt:1: B-PER between O and O is not BIOES"),
        ("a B-PER\nb I-PER\nc S-PER\n", "bioes", r"train.txt:2: I-PER between B-PER and S-PER is not BIOES"),
        ("a E-PER\n", "bioes", r"train.txt:1: E-PER between O and O is not BIOES"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, scheme, message):
    with pytest.raises(ValueError, match=message):
        read_conll(write(tmp_path, content), True, scheme)


def test_a_folder_that_is_no_task(tmp_path):
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
def test_no_word_goes_without_a_tag(tmp_path, tokenizer, seq_length):
    """A model that knows every label gives every tag back, however short the windows."""
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


@pytest.mark.parametrize(
    ("file", "num_sentences", "num_words", "num_entities"),
    [("eng.train", 14041, 203621, 23499), ("eng.testa", 3250, 51362, 5942), ("eng.testb", 3453, 46435, 5648)],
)
def test_the_published_counts_of_conll_2003(file, num_sentences, num_words, num_entities):
    if not (CONLL / file).is_file():
        pytest.skip(f"{file} is not on this machine")
    assert guess_scheme(read_words(CONLL / file, True)) == "iob1"
    sentences = read_conll(CONLL / file, True, "iob1")
    tags = [tag for sentence in sentences for tag in sentence.tags]
    assert (len(sentences), len(tags)) == (num_sentences, num_words)
    assert sum(tag.startswith("B-") for tag in tags) == num_entities


def test_settings_make_the_same_task_again():
    task = ner_task("ner", "train.txt", "dev.txt", "bioes", ["O", "B-X", "I-X"])
    assert ner_task(**task.settings).settings == task.settings
