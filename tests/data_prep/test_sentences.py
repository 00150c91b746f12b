"""Sentence boundaries, with a model trained in the test."""

import subprocess
import sys
import time

import pytest

from data_prep.sentences import SentenceSplitter, load_splitter, train_splitter

NAMES = ("Bennet", "Collins", "Darcy", "Bingley", "Gardiner", "Wickham")
SAMPLE = [
    f"Mr. {name} went out. The rain, i.e. the weather, kept Dr. {other} at home with {name}. He saw the sun at noon. "
    f"It was no. {number} of them. When {other} came, the house was empty."
    for number, name in enumerate(NAMES)
    for other in NAMES
]


@pytest.fixture(scope="module")
def splitter():
    return train_splitter(SAMPLE)


@pytest.mark.parametrize(
    "sentences",
    [
        ["Mr. Darcy was late.", "Dr. Collins, i.e. the doctor, was not."],
        ['"No!" he said.', "Nobody heard."],
        ["“Who is it?” asked the maid.", "(It was the wind.)", "“Go!”"],
        ["He waited ... and waited.", "Then?", "Nothing!"],
        ["J. R. Bennet wrote it.", "He was 50.", "She was not."],
        ["今日は晴れです。", "「本当ですか？」", "はい！"],
        ["No end", ""][:1],
    ],
)
def test_boundaries(splitter, sentences):
    separator = "" if sentences[0][0] == "今" else " "
    assert splitter.split(separator.join(sentences)) == sentences


def test_nothing_is_lost(splitter):
    for paragraph in [*SAMPLE, "...", "a . b", "! ! !", "", "。。", "x.) y", "A. B. C. D."]:
        assert " ".join(splitter.split(paragraph)) == paragraph


def test_training_learns_abbreviations_and_is_saved_whole(splitter, tmp_path):
    assert {"mr", "dr", "i.e"} <= splitter.abbreviations
    splitter.save(tmp_path / "punkt.json")
    assert load_splitter(tmp_path / "punkt.json") == splitter
    assert train_splitter([]) == SentenceSplitter()


def test_training_does_not_depend_on_the_hash_seed(splitter, tmp_path):
    splitter.save(tmp_path / "punkt.json")
    program = f"from data_prep.sentences import *; train_splitter({SAMPLE!r}).save({str(tmp_path / 'other.json')!r})"
    for seed in ("1", "2"):
        subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONHASHSEED": seed, "PATH": ""})
        assert (tmp_path / "other.json").read_bytes() == (tmp_path / "punkt.json").read_bytes()


def test_five_megabytes_without_a_sentence_end_take_no_time(splitter):
    start = time.perf_counter()
    for text in ("word " * 1_000_000, "x" * 5_000_000, "a.b" * 1_700_000, ". " * 100_000, "。" * 100_000):
        splitter.split(text.strip())
    assert time.perf_counter() - start < 10  # 0.6 s here; a quadratic step would take hours
