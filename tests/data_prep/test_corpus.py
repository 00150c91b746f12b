"""Text files to Megatron's .bin/.idx: the bytes that megatron-core writes, for any number of workers; bad input."""

import bz2
import gzip
import json

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from data_prep import corpus
from data_prep.cli import run_cli
from data_prep.corpus import open_corpus
from data_prep.vocab import train_wordpiece

SENTENCES = [f"Sentence {i} speaks of Mr. Smith and his {i % 7} houses. It ends here." for i in range(40)]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(train_wordpiece(SENTENCES, 200)) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def text_folder(tmp_path):
    """The readers' formats, a document or more in each: JSON lines, plain text, gzip, bzip2."""
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [json.dumps({"id": str(i), "text": " ".join(SENTENCES[i : i + 4])}) for i in range(0, 40, 4)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "b.txt").write_text("\n\n".join(SENTENCES[:6]))
    (folder / "c.txt.gz").write_bytes(gzip.compress("\n\n".join(SENTENCES[6:9]).encode()))
    (folder / "d.txt.bz2").write_bytes(bz2.compress("\n\n".join(SENTENCES[9:12]).encode()))
    return folder


def make(text_folder, vocabulary, output, *more):
    corpus.main(["--input", str(text_folder), "--vocab", str(vocabulary), "--output", str(output), *more])


def test_the_bytes_are_those_of_megatrons_builder(text_folder, vocabulary, tmp_path):
    make(text_folder, vocabulary, tmp_path / "ours")
    ours = open_corpus(tmp_path / "ours")
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for first, last in zip(ours.document_start[:-1], ours.document_start[1:], strict=True):
        for sentence in range(first, last):
            tokens = ours.token_ids[ours.sentence_start[sentence] : ours.sentence_start[sentence + 1]]
            builder.add_item(torch.from_numpy(tokens.astype(np.int64)))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / "ours" / f"corpus.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    dataset = IndexedDataset(str(tmp_path / "ours" / "corpus"))
    assert len(dataset) == len(ours.sentence_start) - 1
    assert np.array_equal(dataset[3], ours.token_ids[ours.sentence_start[3] : ours.sentence_start[4]])


def test_workers_do_not_change_the_bytes(text_folder, vocabulary, tmp_path):
    make(text_folder, vocabulary, tmp_path / "one")
    make(text_folder, vocabulary, tmp_path / "two", "--workers", "2")
    for suffix in ("bin", "idx"):
        one, two = ((tmp_path / name / f"corpus.{suffix}").read_bytes() for name in ("one", "two"))
        assert one == two


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "empty|no "), (b"\x00\x01\x02" * 1000, "bad.txt"), (b"\xff\xfe\xfa" * 99, "bad.txt")],
)
def test_input_that_is_no_text_exits_2_and_names_it(content, message, vocabulary, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    if content is not None:
        (folder / "bad.txt").write_bytes(content)
    argv = ["--input", str(folder), "--vocab", str(vocabulary), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        run_cli(corpus.main, argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "error:" in error
    assert any(part in error for part in message.split("|"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_folder_of_another_corpus_is_refused(text_folder, vocabulary, tmp_path):
    make(text_folder, vocabulary, tmp_path / "out")
    before = (tmp_path / "out" / "corpus.bin").read_bytes()
    with pytest.raises(ValueError, match="holds another run"):
        make(text_folder, vocabulary, tmp_path / "out", "--min-characters", "50")
    assert (tmp_path / "out" / "corpus.bin").read_bytes() == before
