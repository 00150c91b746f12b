"""CoNLL's format: three schemes of tags, all read as IOB2, and a message with file and line for invalid ones."""

from pathlib import Path

import pytest

from evaluation.tasks.conll import guess_scheme, read_conll, read_words

CONLL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "ner" / "conll2003"
WORDS = ["John", "and", "Mary", "Ann", "saw", "New", "York"]
IOB2 = ["B-PER", "O", "B-PER", "I-PER", "O", "B-LOC", "I-LOC"]
SCHEMES = {
    "iob1": ["I-PER", "O", "I-PER", "I-PER", "O", "I-LOC", "I-LOC"],
    "iob2": IOB2,
    "bioes": ["S-PER", "O", "B-PER", "E-PER", "O", "B-LOC", "E-LOC"],
}


def write(folder, content):
    path = folder / "train.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(tags, words=WORDS):
    return "".join(f"{word} {tag}\n" for word, tag in zip(words, tags, strict=True))


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
