"""Corpus to shards: the same bytes for any number of workers and after interruptions; balanced, shuffled, complete."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from data_prep import build as build_module
from data_prep.build import BuildOptions, build, cut_into_chunks, main
from data_prep.corpus import Corpus
from data_prep.files import sole_process
from data_prep.indexed_dataset import IndexedDatasetWriter
from data_prep.instances import InstanceRule, make_instances
from data_prep.masking import mask_sequences, masking_rule
from data_prep.shards import Shards
from tests.data_prep.killing import ROOT, finish_through_kills, hashes
from tests.data_prep.small_corpus import make_corpus, make_tokenizer


@pytest.fixture
def small_chunks(monkeypatch):
    """So that a small corpus has several chunks."""
    monkeypatch.setattr(build_module, "CHUNK_TOKENS", 5000)


@pytest.fixture
def source(tmp_path):
    """(tokenizer, corpus) of some 60 documents and 25,000 tokens."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    tokenizer = make_tokenizer(folder)
    return make_corpus(folder, tokenizer), tokenizer


def make(source, output, **options):
    """Build shards of 64 tokens, or do one step of that. Returns the shards unless it was one step."""
    options = {"seq_length": 64, "max_predictions": 10, "duplicates": 2} | options
    build(*source, BuildOptions(corpus=source[0].token_ids.filename, output=output, **options))
    return Shards(output) if not options.keys() & {"prepare", "slice", "finish"} else None


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def originals(shards):
    """The sequences without their masks, as tuples."""
    records = shards.gather(np.arange(shards.num_sequences))
    return [tuple(part) for part in np.split(records.original_token_ids(), np.cumsum(records.lengths)[:-1])]


def test_workers_do_not_change_a_byte(source, tmp_path, small_chunks):
    make(source, tmp_path / "one")
    make(source, tmp_path / "four", workers=4)
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "four")
    shards = sorted(name for name in one if name.startswith("shard-"))
    assert sorted(one) == ["finished.json", "manifest.json", "run.json", *shards, "tokenizer_config.json", "vocab.txt"]


def test_an_interrupted_build_resumes_to_the_same_bytes(source, tmp_path, small_chunks, monkeypatch):
    make(source, tmp_path / "whole", num_shards=5)
    calls = []

    def stop_at_the_third(path, records, write=build_module.write_shard):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(path, records)

    monkeypatch.setattr(build_module, "write_shard", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        make(source, tmp_path / "cut", num_shards=5)
    with pytest.raises(ValueError, match="has not finished"):
        Shards(tmp_path / "cut")
    make(source, tmp_path / "cut", num_shards=5)
    assert len(set(calls)) == 5 and len(calls) == 6, "the two finished shards were kept"
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_slices_do_not_change_a_byte(source, tmp_path, small_chunks):
    make(source, tmp_path / "whole", num_shards=5)
    output = tmp_path / "sliced"
    steps = [{"prepare": True}, *({"slice": (index, 3)} for index in (2, 0, 1)), {"finish": True}]
    for step in steps[1:]:
        with pytest.raises(ValueError, match="not prepared: first run the same command once with --prepare"):
            make(source, output, num_shards=5, **step)
    assert not output.exists()
    for step in steps[:-2]:
        make(source, output, num_shards=5, **step)
    with pytest.raises(ValueError, match="2 of 5 shards are missing, the first shard-00001-of-00005"):
        make(source, output, num_shards=5, finish=True)
    for step in steps[-2:]:
        make(source, output, num_shards=5, **step)
    assert contents(output) == contents(tmp_path / "whole")


RUN_IN_SMALL_CHUNKS = "import sys; from data_prep import build; build.CHUNK_TOKENS = 200_000; build.main()"


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "CHUNK_TOKENS", 200_000)
    folder = tmp_path / "corpus"
    folder.mkdir()
    tokenizer = make_tokenizer(folder)
    corpus = make_corpus(folder, tokenizer, num_documents=1_500)
    writer = IndexedDatasetWriter(folder / "corpus", np.uint16)
    writer.add_documents(corpus.token_ids, np.diff(corpus.sentence_start), np.diff(corpus.document_start))
    writer.finish()
    arguments = ["--corpus", folder, "--vocab", folder / "vocab.txt", "--workers", "2", "--num-shards", "40"]
    main([*map(str, arguments), "--output", str(tmp_path / "whole")])
    for end in finish_through_kills(RUN_IN_SMALL_CHUNKS, arguments, tmp_path / "killed"):
        assert end == hashes(tmp_path / "whole")


def test_chunk_size_is_only_about_memory(source, tmp_path, monkeypatch):
    whole = make(source, tmp_path / "one_chunk", duplicates=1)
    monkeypatch.setattr(build_module, "CHUNK_TOKENS", 3000)
    assert len(cut_into_chunks(source[0].sentence_start, source[0].document_start, 1)) > 4
    parts = make(source, tmp_path / "chunks", duplicates=1)
    assert contents(whole.folder) == contents(parts.folder)


@pytest.mark.parametrize("pair_task", ["nsp", "sop", "none"])
def test_every_instance_is_there_once_shuffled_and_balanced(source, tmp_path, pair_task, small_chunks):
    shards = make(source, tmp_path / "shards", pair_task=pair_task, num_shards=7)
    corpus = source[0]
    rule = InstanceRule(64, pair_task, duplicates=2)
    instances = make_instances(corpus.sentence_start, corpus.document_start, range(60), rule)

    def sequence(instance):
        _, a, b, num_a, num_b, _ = instance
        second = [*corpus.token_ids[b : b + num_b].tolist(), 3] if num_b else []
        return (2, *corpus.token_ids[a : a + num_a].tolist(), 3, *second)

    in_order = [sequence(instance) for instance in instances.tolist()]
    shuffled = originals(shards)
    assert Counter(shuffled) == Counter(in_order)
    assert sum(a == b for a, b in zip(shuffled, in_order, strict=True)) < 0.05 * len(in_order)
    sizes = [entry["num_sequences"] for entry in shards.manifest["shards"]]
    assert len(sizes) == 7 and max(sizes) - min(sizes) <= 1
    records = shards.gather(np.arange(shards.num_sequences))
    assert records.lengths.max() <= 64
    assert Counter(records.pair_labels.tolist()) == Counter(instances["pair_label"].tolist())
    separators = records.token_ids[np.cumsum(records.lengths) - records.lengths + records.segment_b_start - 1]
    assert (separators == 3).all()


@pytest.mark.parametrize(
    "sentence_lengths, pair_task, warning",
    [
        ([[9]] * 40, "nsp", "100% of the pairs have a random second segment.*a document has 1.0 sentences.*9 tokens"),
        ([[500]] * 40, "nsp", "100% of the pairs.* and 88% of the text is in no sequence"),
        ([[300]] * 40 + [[30, 30]], "sop", "^warning: 100% of the text is in no sequence"),
        ([[300]] * 40, "none", None),
        ([[9] * 30] * 40, "nsp", None),
        ([[9] * 30] * 40, "sop", None),
    ],
)
def test_a_warning_about_sentences_that_hardly_suit(source, tmp_path, capsys, sentence_lengths, pair_task, warning):
    lengths = [sum(sentence_lengths, []), [len(document) for document in sentence_lengths]]
    bounds = [np.concatenate([[0], np.cumsum(column)]) for column in lengths]
    np.full(bounds[0][-1], 7, np.uint16).tofile(tmp_path / "t.bin")
    corpus = Corpus(np.memmap(tmp_path / "t.bin", np.uint16, mode="r"), *bounds, manifest=None)
    for _ in ("new", "its chunks are there"):
        make((corpus, source[1]), tmp_path / "shards", pair_task=pair_task, prepare=True)
        (tmp_path / "shards" / "chunks" / "prepared.json").unlink()
        lines = capsys.readouterr().err.splitlines()  # another may say that the case of the vocabulary is guessed
        found = [line for line in lines if line.startswith("warning") and "no file beside" not in line]
        assert len(found) == (warning is not None) and (not warning or re.search(warning, found[0]))


def test_two_builds_of_one_folder_are_refused(source, tmp_path):
    with sole_process(tmp_path / "shards", shared=True), pytest.raises(ValueError, match="another process is working"):
        make(source, tmp_path / "shards")
    assert make(source, tmp_path / "shards").num_sequences


def test_a_read_only_checkout_and_home(tmp_path):
    """numba finds no folder for its cache there; a temporary one serves, and where there is none either, no cache."""
    as_owner = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    if as_owner and not shutil.which("setpriv"):
        pytest.skip("root writes anywhere")
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "data_prep", checkout / "data_prep", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tmp").mkdir()
    for folder in (checkout / "data_prep", checkout):
        folder.chmod(0o555)
    command = [*as_owner, sys.executable, "-m", "data_prep.build", "--help"]
    for temporary in (tmp_path / "tmp", checkout):
        environment = {**os.environ, "HOME": str(checkout), "TMPDIR": str(temporary)}
        environment = {
            name: value for name, value in environment.items() if name not in ("XDG_CACHE_HOME", "PYTHONPATH")
        }
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "") and "--seq-length" in done.stdout
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "tmp").iterdir()] == [0o700]


def test_duplicates_have_other_masks(source, tmp_path):
    shards = make(source, tmp_path / "shards", pair_task="none", duplicates=4, short_seq_prob=0.0)
    records = shards.gather(np.arange(shards.num_sequences))
    masked = [tuple(part) for part in np.split(records.token_ids, np.cumsum(records.lengths)[:-1])]
    assert set(Counter(originals(shards)).values()) == {4}
    assert len(set(masked)) > 0.98 * len(masked)


def test_the_manifest_records_what_was_done(source, tmp_path):
    manifest = make(source, tmp_path / "shards", seed=3).manifest
    assert manifest["config"] == {
        "seq_length": 64,
        "max_predictions": 10,
        "duplicates": 2,
        "pair_task": "nsp",
        "masked_lm_prob": 0.15,
        "whole_word": False,
        "max_ngram": 1,
        "short_seq_prob": 0.1,
        "seed": 3,
    }
    assert manifest["vocab"]["sha256"] == source[1].sha256 and manifest["vocab"]["mask_id"] == 4
    assert manifest["corpus"]["num_documents"] == 60
    num_bytes = sum(entry["num_bytes"] for entry in manifest["shards"])
    exact = 2 * manifest["num_tokens"] + 4 * manifest["num_predictions"] + 11 * manifest["num_sequences"]
    assert exact < num_bytes < exact + 700 * len(manifest["shards"])


@pytest.mark.parametrize("whole_word", [False, True])
def test_stored_masks_are_those_of_epoch_0(source, tmp_path, whole_word):
    """So a loader that makes new masks for each epoch starts with the stored ones."""
    shards = make(source, tmp_path / "shards", whole_word=whole_word, seed=5)
    samples = np.array([40, 3, 200])
    records = shards.gather(samples)
    rule = masking_rule(source[1], masked_lm_prob=0.15, max_predictions=10, whole_word=whole_word)
    masked = mask_sequences(records, samples, rule, seed=5, epoch=0)
    assert (masked.token_ids == records.token_ids).all()
    assert masked.num_predictions.tolist() == records.num_predictions.tolist()
    assert masked.masked_lm_positions.tolist() == records.masked_lm_positions.tolist()


def test_command_line_on_a_megatron_corpus(source, tmp_path):
    """A corpus without a manifest needs --vocab; a second run of the same command reuses, another refuses."""
    corpus, tokenizer = source
    writer = IndexedDatasetWriter(tmp_path / "megatron", np.uint16)
    for first, last in zip(corpus.document_start[:-1], corpus.document_start[1:], strict=True):
        bounds = corpus.sentence_start[first : last + 1]
        writer.add_documents(corpus.token_ids[bounds[0] : bounds[-1]], np.diff(bounds), [len(bounds) - 1])
    writer.finish()
    vocab = shutil.copyfile(tokenizer.path, tmp_path / "other-vocab.txt")
    command = ["--corpus", str(tmp_path / "megatron"), "--vocab", str(vocab), "--output", str(tmp_path / "shards")]
    options = ["--seq-length", "64", "--max-predictions", "10", "--duplicates", "2"]
    main([*command, *options])
    made = contents(tmp_path / "shards")
    ours = contents(make(source, tmp_path / "ours").folder)
    assert {n: b for n, b in made.items() if n.startswith("shard-")} == {
        n: b for n, b in ours.items() if n[:6] == "shard-"
    }
    main([*command, *options])
    assert contents(tmp_path / "shards") == made
    with pytest.raises(ValueError, match="seed: 0 there, 1 requested"):
        main([*command, *options, "--seed", "1"])
    assert contents(tmp_path / "shards") == made


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--seq-length 7", "--seq-length: 7 is not between 8 and 65535"),
        ("--max-predictions 64 --seq-length 64", "--max-predictions 64 is not below --seq-length 64"),
        ("--duplicates 0", "--duplicates: 0 is below 1"),
        ("--pair-task nps", "--pair-task: invalid choice: 'nps'"),
        ("--max-ngram 11", "--max-ngram: 11 is not between 1 and 10"),
        ("--masked-lm-prob 1", "--masked-lm-prob: 1 is not below 1"),
        ("--short-seq-prob -0.1", "--short-seq-prob: -0.1 is not between 0 and 1"),
        ("--seed -1", "--seed: -1 is not between 0 and"),
        ("--num-shards 0", "--num-shards: 0 is below 1"),
    ],
)
def test_values_outside_their_rules(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        main(["--corpus", str(tmp_path / "c"), "--output", str(tmp_path / "shards"), *flags.split()])
    assert not (tmp_path / "shards").exists()


def test_corpora_that_cannot_serve(source, tmp_path):
    corpus, tokenizer = source

    def refused(match, pair_task="nsp", vocab=tokenizer, **changes):
        with pytest.raises(ValueError, match=match):
            make((corpus._replace(**changes), vocab), tmp_path / "shards", pair_task=pair_task)
        assert not (tmp_path / "shards").exists()

    starts = corpus.sentence_start
    refused("needs 2 documents, and the corpus has 1.*--pair-task sop", document_start=np.array([0, len(starts) - 1]))
    refused("no text", sentence_start=np.array([0]), document_start=np.array([0]))
    refused("at least two sentences", "sop", document_start=np.arange(len(starts)))
    refused("is not the one the corpus was tokenised", manifest={"vocab": {"sha256": "0" * 64}})
    small = tmp_path / "small"
    small.mkdir()
    (small / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    refused("holds token id 499 and .* has 6 entries", manifest=None, vocab=build_module.load_tokenizer(small))
    with pytest.raises(ValueError, match="--num-shards 1000000 exceeds the .* sequences"):
        make(source, tmp_path / "shards", num_shards=10**6)
    assert not (tmp_path / "shards").exists()


def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "data_prep.build", "--corpus", str(tmp_path), "--output", str(tmp_path / "shards")]
    result = subprocess.run([*command, "--seq-length", "3"], capture_output=True, text=True)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("error: argument --seq-length: 3 is not between")
    assert not list(tmp_path.iterdir())
