"""Training vocabularies: the right pieces, the same bytes every time, refusals before anything is written."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import vocab
from data_prep.files import read_json, sha256_file
from data_prep.text.tokenizer import load_tokenizer
from data_prep.text.vocab_files import SPECIAL_TOKENS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """Some 150 kB of made-up words with capitals and accents."""
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghijklmnopqrstuvwxyzéöñ", k=choose.randint(2, 9))) for _ in range(2_000)]
    lines = [" ".join(choose.choices(words, k=12)).capitalize() + "." for _ in range(2_000)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


def run(text_file, output, *options):
    vocab.main(["--input", str(text_file), "--output", str(output), "--size", "500", *options])


@pytest.mark.parametrize("type_, file", vocab.TYPES.items())
def test_every_type_trains_loads_and_repeats_in_another_process(text_file, tmp_path, type_, file):
    run(text_file, tmp_path / "a", "--type", type_)
    tokenizer = load_tokenizer(tmp_path / "a")
    assert (
        tokenizer.vocab_size == 500 and tuple(tokenizer.tokens[:5]) == SPECIAL_TOKENS and tokenizer.folding.lower_case
    )
    assert read_json(tmp_path / "a" / "manifest.json")["vocab"]["sha256"] == tokenizer.sha256
    arguments = ["--input", text_file, "--output", tmp_path / "b", "--size", "500", "--type", type_]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-m", "data_prep.vocab", *arguments], cwd=ROOT, check=True, env=environment)
    assert sha256_file(tmp_path / "b" / file) == tokenizer.sha256


@pytest.mark.parametrize("type_", ["sentencepiece", "wordpiece"])
def test_cased_keeps_capitals_and_accents(text_file, tmp_path, type_):
    run(text_file, tmp_path / "v", "--type", type_, "--cased")
    tokenizer = load_tokenizer(tmp_path / "v")
    assert not tokenizer.folding.lower_case
    assert tokenizer.encode("Éa") != tokenizer.encode("éa") != tokenizer.encode("ea")


def test_a_finished_one_is_reused_and_another_refused(text_file, tmp_path, capsys):
    run(text_file, tmp_path / "v")
    before = sha256_file(tmp_path / "v" / "spm.model")
    run(text_file, tmp_path / "v")
    assert "reused" in capsys.readouterr().out
    with pytest.raises(ValueError, match="cased: False there, True requested"):
        run(text_file, tmp_path / "v", "--cased")
    assert sha256_file(tmp_path / "v" / "spm.model") == before


def test_smoothing_gives_a_small_language_more_than_its_size(tmp_path):
    """A corpus of 600 kB in Latin letters, one of 6 kB in Greek ones, a sample of 100 kB."""
    choose = random.Random(0)
    for name, letters, num_lines in (("big", "abcdefghij", 10_000), ("small", "αβγδεζηθικ", 50)):
        (tmp_path / name).mkdir()
        lines = (" ".join("".join(choose.choices(letters, k=5)) for _ in range(10)) for _ in range(num_lines))
        (tmp_path / name / "text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    assert vocab.smoothed_shares([600, 6], 1) == pytest.approx([600 / 606, 6 / 606])
    assert vocab.smoothed_shares([600, 6], 0) == [0.5, 0.5]
    assert vocab.smoothed_shares([10_000, 100], 0.5) == pytest.approx([10 / 11, 1 / 11])
    num_greek = {}
    for smoothing in ("1", "0.5"):
        inputs, output = ["--input", f"{tmp_path}/big", f"{tmp_path}/small"], ["--output", f"{tmp_path}/{smoothing}"]
        vocab.main([*inputs, *output, "--size", "400", "--sample-mb", "0.1", "--smoothing", smoothing])
        tokens = load_tokenizer(tmp_path / smoothing).tokens
        num_greek[smoothing] = sum(token.strip("▁")[:1] >= "α" for token in tokens if token.strip("▁"))
    assert num_greek["0.5"] > 1.5 * num_greek["1"]


def test_mistakes_are_reported_before_anything_is_written(text_file, tmp_path):
    for options, message in (
        (["--size", "7"], "--size: 7 is not between 100 and 1000000"),
        (["--sample-mb", "0"], "--sample-mb: 0 is not above 0"),
        (["--smoothing", "2"], "--smoothing: 2 is not between 0 and 1"),
        (["--format", "jsonl"], r"holds no document; .*text\.txt:1: not valid JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            run(text_file, tmp_path / "v", *options)
        assert not (tmp_path / "v").exists()


def test_more_pieces_than_the_text_has_can_be_asked_for_again_with_fewer(text_file, tmp_path):
    with pytest.raises(ValueError, match="cannot make --size 90000 .*; ask for at most"):
        run(text_file, tmp_path / "v", "--size", "90000")
    run(text_file, tmp_path / "v", "--size", "600")
    with pytest.raises(ValueError, match="less than the .* special tokens and characters"):
        vocab.train_wordpiece([text_file.read_text(encoding="utf-8")], 20)
