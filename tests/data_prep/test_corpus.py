"""The tokenised corpus: Megatron's bytes, the same for any number of workers, filters counted, nothing lost."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tqdm import tqdm

from data_prep import build, corpus, parts
from data_prep.cli import InputOptions
from data_prep.corpus import open_corpus
from data_prep.files import sole_process
from data_prep.indexed_dataset import IndexedDatasetWriter, read_indexed_dataset, token_type
from data_prep.shards import Shards
from data_prep.text.vocab_files import SPECIAL_TOKENS
from tests.data_prep.killing import ROOT, finish_through_kills, hashes

RANDOM = np.random.default_rng(0)
WORDS = [f"w{i}" for i in range(200)]


def make_documents(num_documents):
    """Documents of sentences of known words; every tenth one repeats the first."""
    documents = []
    for index in range(num_documents):
        sentences = [" ".join(RANDOM.choice(WORDS, 9)).capitalize() + "." for _ in range(1 + index % 7)]
        documents.append(" ".join(sentences) if index % 10 or not index else documents[0])
    return documents


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with text.jsonl (100 documents and two bad lines) and vocab/vocab.txt."""
    folder = tmp_path_factory.mktemp("inputs")
    lines = [json.dumps({"text": text}) for text in make_documents(100)]
    lines[50:50] = ["no json", json.dumps({"text": ""}), json.dumps({"text": "W1."})]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "vocab").mkdir()
    (folder / "vocab" / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, ".", *WORDS]) + "\n", encoding="utf-8")
    return folder


def run(inputs, output, *options):
    source = [] if "--input" in options else ["--input", inputs / "text.jsonl"]
    arguments = [*source, "--vocab", inputs / "vocab", "--output", output, *options]
    corpus.main([str(argument) for argument in arguments])


def test_documents_sentences_tokens_and_what_was_dropped(inputs, tmp_path):
    run(inputs, tmp_path / "c", "--min-characters", "10")
    opened = open_corpus(tmp_path / "c")
    manifest = opened.manifest
    assert manifest["num_documents"] == len(opened.document_start) - 1 == 91
    assert manifest["dropped"] == {"duplicate": 9, "empty": 1, "shorter_than_min_characters": 1}
    assert manifest["skipped"] == {"not valid JSON": 1}
    assert manifest["num_sentences"] == len(opened.sentence_start) - 1
    assert manifest["num_tokens"] == len(opened.token_ids) == opened.sentence_start[-1]
    assert np.array_equal(np.diff(opened.document_start), [1 + i % 7 for i in range(100) if i % 10 or not i])
    assert (np.diff(opened.sentence_start) == 10).all()  # nine words and the full stop
    assert (opened.token_ids[opened.sentence_start[1:] - 1] == 5).all()
    assert manifest["num_unknown_tokens"] == 0
    assert {name: hashes(tmp_path / "c")[name] for name in manifest["sha256"]} == manifest["sha256"]
    others = {"run.json", "finished.json", "manifest.json", "tokenizer_config.json"}
    assert set(hashes(tmp_path / "c")) - {*manifest["sha256"]} == others


@pytest.fixture
def small_parts(monkeypatch):
    """Some thirty parts in three volumes."""
    monkeypatch.setattr(parts, "PART_CHARACTERS", 1_000)
    monkeypatch.setattr(parts, "VOLUME_BYTES", 6_000)


def cut_in_files(inputs, folder):
    """The same documents in seven files."""
    folder.mkdir()
    lines = (inputs / "text.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for number in range(7):
        (folder / f"{number}.jsonl").write_text("".join(lines[number * 15 : number * 15 + 15]), encoding="utf-8")
    return folder


def test_the_bytes_depend_neither_on_workers_nor_on_slices(inputs, tmp_path, small_parts):
    text = cut_in_files(inputs, tmp_path / "text")
    assert len(parts.volumes(sorted(text.iterdir()))) == 3
    options = ["--input", str(text), "--scrub", "urls", "--near-duplicates", "0.9"]
    run(inputs, tmp_path / "one", *options)
    run(inputs, tmp_path / "four", *options, "--workers", "4")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "four")
    for num_slices in (2, 3, 5):  # fewer than volumes, as many, and more
        output = tmp_path / f"{num_slices} slices"
        run(inputs, output, *options, "--prepare")
        for index in reversed(range(num_slices)):
            run(inputs, output, *options, "--slice", f"{index}/{num_slices}")
        run(inputs, output, *options, "--finish")
        assert hashes(output) == hashes(tmp_path / "one")


def test_lists_of_inputs_and_scrubbers_may_be_given_in_several_places(inputs, tmp_path):
    text = cut_in_files(inputs, tmp_path / "text")
    files = [str(path) for path in sorted(text.iterdir())]
    run(inputs, tmp_path / "c", "--input", *files, "--scrub", "emails", "urls")
    one_by_one = [option for file in files for option in ("--input", file)]
    run(inputs, tmp_path / "d", *one_by_one, "--scrub", "urls", "--scrub", "emails", "urls")
    assert hashes(tmp_path / "c") == hashes(tmp_path / "d")
    assert open_corpus(tmp_path / "d").manifest["config"]["scrub"] == ["emails", "urls"]


def test_two_processes_in_one_folder_are_refused(inputs, tmp_path):
    with sole_process(tmp_path / "c"):
        for step in ((), ("--prepare",)):
            with pytest.raises(ValueError, match=f"another process is working in {tmp_path / 'c'}; wait"):
                run(inputs, tmp_path / "c", *step)
    run(inputs, tmp_path / "c", "--prepare")
    with sole_process(tmp_path / "c", shared=True):  # another slice
        run(inputs, tmp_path / "c", "--slice", "0/1")
        with pytest.raises(ValueError, match="another process is working"):
            run(inputs, tmp_path / "c", "--finish")
    run(inputs, tmp_path / "c", "--finish")


def test_chinese_by_character_with_its_own_sentence_ends(tmp_path):
    """。！？ end sentences, each character is a token, and pairs and masks are as in any language."""
    characters = [chr(code) for code in range(0x4E00, 0x4E00 + 300)]
    documents = [
        ["".join(RANDOM.choice(characters, 5 + 3 * i % 17)) + "。！？"[i % 3] for i in range(4 + d)] for d in range(20)
    ]
    lines = (json.dumps({"text": "".join(sentences)}, ensure_ascii=False) for sentences in documents)
    (tmp_path / "zh.jsonl").write_text("\n".join(lines), encoding="utf-8")
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join([*SPECIAL_TOKENS, *"。！？，", *characters]) + "\n", encoding="utf-8")
    run(tmp_path, tmp_path / "c", "--input", str(tmp_path / "zh.jsonl"), "--vocab", str(vocab))
    opened = open_corpus(tmp_path / "c")
    assert np.array_equal(np.diff(opened.document_start), [len(sentences) for sentences in documents])
    expected = [len(sentence) for sentences in documents for sentence in sentences]
    assert np.array_equal(np.diff(opened.sentence_start), expected)
    assert opened.manifest["num_unknown_tokens"] == 0
    build.main(["--corpus", str(tmp_path / "c"), "--output", str(tmp_path / "s"), "--seq-length", "64", "--whole-word"])
    shards = Shards(tmp_path / "s")
    records = shards.gather(np.arange(shards.num_sequences))
    assert set(np.unique(records.pair_labels)) == {0, 1}
    assert records.num_predictions.tolist() == [max(1, round(0.15 * n)) for n in records.lengths.tolist()]


def test_slices_that_read_different_text_are_refused(inputs, tmp_path, small_parts):
    text = cut_in_files(inputs, tmp_path / "text")
    options = ["--input", str(text)]
    run(inputs, tmp_path / "c", *options, "--prepare")
    run(inputs, tmp_path / "c", *options, "--slice", "0/5")
    changed = (text / "0.jsonl").read_text(encoding="utf-8").replace(". W", "? W", 1)
    (text / "0.jsonl").write_text(changed, encoding="utf-8")
    with pytest.raises(ValueError, match=r"volume-00000.json: another slice read different text"):
        run(inputs, tmp_path / "c", *options, "--slice", "1/5")


def test_tiny_documents_are_bounded_by_their_number(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_DOCUMENTS", 9)
    files = [inputs / "text.jsonl"]
    sources = parts.missing_sources(tmp_path, files, InputOptions(input=()), (0, 1), tqdm(disable=True))
    assert [len(source.documents) for source in sources] == [9] * 11 + [3]


def test_steps_out_of_order_are_refused(inputs, tmp_path, small_parts):
    for step in (("--slice", "0/2"), ("--finish",)):
        with pytest.raises(ValueError, match="not prepared: first run the same command once with --prepare"):
            run(inputs, tmp_path / "c", *step)
    assert not (tmp_path / "c").exists()
    run(inputs, tmp_path / "c", "--prepare")
    with pytest.raises(ValueError, match="1 of 1 volumes are missing, the first volume-00000.json; run"):
        run(inputs, tmp_path / "c", "--finish")
    run(inputs, tmp_path / "c", "--slice", "0/2")
    with pytest.raises(ValueError, match="parts are missing, the first part-00000-00001"):
        run(inputs, tmp_path / "c", "--finish")
    part = next((tmp_path / "c" / "parts").glob("part-*"))
    part.write_bytes(part.read_bytes()[:-9])
    run(inputs, tmp_path / "c", "--slice", "1/2")
    with pytest.raises(ValueError, match=f"{part.name} is damaged"):
        run(inputs, tmp_path / "c", "--finish")
    with pytest.raises(ValueError, match="argument --slice: '2/2' is not I/N"):
        run(inputs, tmp_path / "c", "--slice", "2/2")


RUN_IN_SMALL_PARTS = "import sys; from data_prep import corpus, parts; parts.PART_CHARACTERS = 1_000; corpus.main()"


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_gives_the_same_bytes(inputs, tmp_path, small_parts):
    run(inputs, tmp_path / "whole")
    arguments = ["--input", inputs / "text.jsonl", "--workers", "2", "--vocab", inputs / "vocab"]
    for end in finish_through_kills(RUN_IN_SMALL_PARTS, arguments, tmp_path / "killed"):
        assert end == hashes(tmp_path / "whole")


def test_a_full_disk_is_reported_and_finished_files_stay(inputs, small_disk, tmp_path, small_parts):
    filler = small_disk / "filler"
    for step, num_free in (("--slice", "0/1"), 30_000), (("--finish",), 4_096):
        run(inputs, small_disk / "c", "--prepare")
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - num_free))
        with pytest.raises(OSError, match="No space left") as raised:
            run(inputs, small_disk / "c", *step)
        assert str(small_disk / "c") in raised.value.filename
        assert not list((small_disk / "c").rglob("*.tmp"))
        filler.unlink()
        if num_free == 30_000:
            run(inputs, small_disk / "c", *step)
    run(inputs, tmp_path / "whole")
    run(inputs, small_disk / "c")
    assert hashes(small_disk / "c") == hashes(tmp_path / "whole")


def test_a_file_that_vanishes_is_counted(inputs, tmp_path, monkeypatch):
    text = cut_in_files(inputs, tmp_path / "text")
    original = corpus.prepare

    def prepare_then_lose_a_file(*arguments):
        original(*arguments)
        (text / "3.jsonl").rename(tmp_path / "gone.jsonl")

    monkeypatch.setattr(corpus, "prepare", prepare_then_lose_a_file)
    run(inputs, tmp_path / "c", "--input", str(text))
    assert open_corpus(tmp_path / "c").manifest["skipped"] == {"unreadable: No such file or directory": 1}


def test_a_finished_corpus_is_reused_another_refused_an_interrupted_one_completed(inputs, tmp_path, capsys):
    run(inputs, tmp_path / "c")
    before = hashes(tmp_path / "c")
    run(inputs, tmp_path / "c", "--workers", "2")
    assert "reused" in capsys.readouterr().out
    with pytest.raises(ValueError, match="min_characters: 1 there, 2 requested"):
        run(inputs, tmp_path / "c", "--min-characters", "2")
    for name in ("finished.json", "manifest.json", "corpus.idx"):
        (tmp_path / "c" / name).unlink()
    (tmp_path / "c" / "corpus.bin.tmp").write_bytes(b"half")
    run(inputs, tmp_path / "c")
    assert hashes(tmp_path / "c") == before


def test_mistakes_exit_with_2_and_write_nothing(inputs, tmp_path):
    (tmp_path / "noise.txt").write_bytes(b"a\n\xff\0")
    (tmp_path / "empty").mkdir()
    vocab = inputs / "vocab" / "vocab.txt"
    (tmp_path / "short.txt").write_text(vocab.read_text(encoding="utf-8").replace("[MASK]\n", ""), encoding="utf-8")
    for source, vocab_file, message in (
        (tmp_path / "noise.txt", vocab, f"{tmp_path / 'noise.txt'}:2"),
        (tmp_path / "empty", vocab, "holds no text"),
        (inputs / "text.jsonl", tmp_path / "short.txt", "has no [MASK]"),
    ):
        command = [sys.executable, "-m", "data_prep.corpus", "--input", source, "--vocab", vocab_file]
        done = subprocess.run([*command, "--output", tmp_path / "c"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert message in done.stderr
        assert not (tmp_path / "c").exists()


def test_a_corpus_with_no_document_left_is_refused(inputs, tmp_path):
    with pytest.raises(ValueError, match="no document is left: {'empty': 1, 'not valid JSON': 1, 'shorter_.*': 101}"):
        run(inputs, tmp_path / "c", "--min-characters", "100000")
    assert not list((tmp_path / "c").glob("corpus.*"))


def test_data_prep_does_not_import_torch():
    program = "import sys, data_prep.corpus, data_prep.vocab; sys.exit('torch' in sys.modules or 'nltk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("vocab_size", [65_499, 65_500])
def test_megatron_reads_ours_and_writes_the_same_bytes(tmp_path, vocab_size):
    torch = pytest.importorskip("torch")
    from megatron.core.datasets import indexed_dataset as megatron

    assert token_type(vocab_size) is megatron.DType.optimal_dtype(vocab_size)
    documents = [
        RANDOM.integers(0, vocab_size, RANDOM.integers(1, 50, n).tolist()[0] * n).reshape(n, -1) for n in (3, 1, 9)
    ]
    ours = IndexedDatasetWriter(tmp_path / "ours", token_type(vocab_size))
    theirs = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=token_type(vocab_size))
    for document in documents:
        lengths = np.full(len(document), document.shape[1])
        ours.add_documents(document.ravel(), lengths, [len(lengths)])
        theirs.add_document(torch.from_numpy(document.ravel()), lengths.tolist())
    ours.finish()
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for part in ("bin", "idx"):
        assert (tmp_path / f"ours.{part}").read_bytes() == (tmp_path / f"theirs.{part}").read_bytes()
    dataset = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == [row.tolist() for d in documents for row in d]
    opened = open_corpus(tmp_path / "theirs.idx")
    assert opened.manifest is None and opened.document_start.tolist() == dataset.document_indices.tolist() == [
        0,
        3,
        4,
        13,
    ]
    assert np.array_equal(opened.token_ids, np.concatenate([d.ravel() for d in documents]))


def test_golden_bytes_of_the_index(tmp_path):
    writer = IndexedDatasetWriter(tmp_path / "x", np.uint16)
    writer.add_documents(np.array([7, 8, 9]), np.array([2, 1]), [2])
    writer.finish()
    assert (tmp_path / "x.bin").read_bytes().hex() == "070008000900"
    assert (tmp_path / "x.idx").read_bytes().hex() == (
        "4d4d4944494458 0000 0100000000000000 08 0200000000000000 0200000000000000"
        "02000000 01000000 0000000000000000 0400000000000000 0000000000000000 0200000000000000"
    ).replace(" ", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_a_long_index_is_written_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.indexed_dataset._CHUNK", 64)
    lengths = RANDOM.integers(1, 9, 1_000)
    writer = IndexedDatasetWriter(tmp_path / "x", np.int32)
    writer.add_documents(np.arange(lengths.sum()), lengths, [len(lengths)])
    writer.finish()
    token_ids, sequence_start, document_start = read_indexed_dataset(tmp_path / "x")
    assert np.array_equal(np.diff(sequence_start), lengths) and np.array_equal(token_ids, np.arange(lengths.sum()))
    assert document_start.tolist() == [0, 1_000]


def test_damaged_datasets_are_refused(tmp_path):
    writer = IndexedDatasetWriter(tmp_path / "x", np.uint16)
    writer.add_documents(np.arange(3), np.array([2, 1]), [2])
    writer.finish()
    index, tokens = (tmp_path / "x.idx").read_bytes(), (tmp_path / "x.bin").read_bytes()
    for damaged, message in (
        (index[:-1], "cut short"),
        (index[:20], "not a version 1 Megatron index"),
        (b"PK" + index[2:], "not a version 1 Megatron index"),
        (index.replace(b"\2\0\0\0\1\0\0\0", b"\1\0\0\0\2\0\0\0"), "do not agree"),
    ):
        (tmp_path / "x.idx").write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            read_indexed_dataset(tmp_path / "x")
    (tmp_path / "x.idx").write_bytes(index)
    (tmp_path / "x.bin").write_bytes(tokens[:-2])
    with pytest.raises(ValueError, match="has 4 bytes where its index says 6"):
        read_indexed_dataset(tmp_path / "x")
    with pytest.raises(ValueError, match=r"y\.bin does not exist"):
        read_indexed_dataset(tmp_path / "y")
