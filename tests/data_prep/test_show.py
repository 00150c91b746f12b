"""The records, statistics and plots that show prints for a folder with known contents."""

import json
import re

import numpy as np
import pytest

from data_prep.build import BuildOptions, build
from data_prep.shards import Records, Shards, make_manifest, shard_entry, unigram_entropy, write_shard
from data_prep.show import collect_statistics, format_record, main, statistics_table
from data_prep.text.tokenizer import load_tokenizer
from tests.data_prep.small_corpus import make_corpus, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("show")
    tokenizer = make_tokenizer(base)
    sizes = {"seq_length": 64, "max_predictions": 10, "duplicates": 2}
    corpus = make_corpus(base, tokenizer)
    build(corpus, tokenizer, BuildOptions(corpus=base, output=base / "shards", **sizes))
    return base / "shards"


def test_a_record_is_readable_and_marked(tmp_path):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "walk", "##ed", "##s", "home"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n")
    tokenizer = load_tokenizer(tmp_path)
    # [CLS] the [MASK] walk##s [SEP] the home [SEP]: cat masked, ##ed replaced by ##s, home kept
    records = Records(
        sequence_start=np.array([0, 9]),
        prediction_start=np.array([0, 3]),
        token_ids=np.array([2, 5, 4, 7, 9, 3, 5, 10, 3], np.uint16),
        masked_lm_labels=np.array([6, 8, 10]),
        masked_lm_positions=np.array([2, 4, 7]),
        segment_b_start=np.array([6]),
        pair_labels=np.array([1]),
    )
    write_shard(tmp_path / "shard-0.safetensors", records)
    entry = shard_entry(tmp_path / "shard-0.safetensors")
    vocab = {"file": "vocab.txt", "sha256": tokenizer.sha256}
    (tmp_path / "manifest.json").write_text(json.dumps(make_manifest({"pair_task": "nsp"}, vocab, {}, [entry])))
    assert format_record(Shards(tmp_path), 0, tokenizer).split("\n") == [
        "#0: 9 tokens, 3 predictions, B is from another document",
        "  A  [CLS] the [MASK→cat] walk[s→ed] [SEP]",
        "  B  the [=home] [SEP]",
    ]


def test_statistics_are_those_of_the_folder(folder):
    shards = Shards(folder)
    statistics = collect_statistics(shards)
    table = dict(statistics_table(shards, statistics))
    records = shards.gather(np.arange(shards.num_sequences))
    assert (statistics["lengths"] == records.lengths).all()
    assert statistics["fate"].sum() == len(records.masked_lm_labels)
    originals = np.split(records.original_token_ids(), np.cumsum(records.lengths)[:-1])
    assert len(np.unique(statistics["fingerprints"])) == len({tuple(sequence) for sequence in originals})
    assert (statistics["segment_b_lengths"] > 0).all()
    assert table["unigram entropy"] == f"{unigram_entropy(shards):.4f} nat"
    assert table["tokens"] == f"{shards.manifest['num_tokens']:,}"
    shares = [float(share) for share in re.findall(r"[\d.]+(?= %)", table["  became [MASK] / kept / random"])]
    assert shares == pytest.approx([80, 10, 10], abs=3)
    assert "B follows A" in table and "B is from another document" in table


def test_command_line(folder, tmp_path, capsys):
    main([str(folder), "--records", "2", "--first", "5"])
    printed = capsys.readouterr().out
    assert re.findall(r"^#\d+", printed, flags=re.MULTILINE) == ["#5", "#6"] and "[MASK→" in printed
    main([str(folder)])
    assert capsys.readouterr().out.count("predictions,") == 3
    main([str(folder), "--stats", "--plots", str(tmp_path / "plots"), "--verify"])
    printed = capsys.readouterr().out
    assert "unigram entropy" in printed and "match their checksums" in printed and "#0:" not in printed
    plots = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert plots == ["lengths.png", "num_predictions.png", "segment_b_lengths.png", "unigrams.png"]
    with pytest.raises(ValueError, match="--records: -1 is below 0"):
        main([str(folder), "--records", "-1"])


def test_verify_names_the_damaged_shard(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    damaged = next(copy.glob("shard-00002-*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match="shard-00002"):
        main([str(copy), "--verify"])
