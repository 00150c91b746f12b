"""The shard format byte by byte, the reader against plain lists, and a plain error for every kind of damage."""

import json
import shutil
from contextlib import nullcontext

import numpy as np
import pytest

from data_prep.shards import (
    Records,
    Shards,
    make_manifest,
    shard_entry,
    unigram_counts,
    unigram_entropy,
    verify,
    write_shard,
)
from tests.data_prep.small_corpus import VOCAB_SIZE, make_tokenizer

# The worked example of the format's specification.
EXAMPLE = Records(
    sequence_start=np.array([0, 8, 12]),
    prediction_start=np.array([0, 2, 2]),
    token_ids=np.array([2, 5, 4, 7, 3, 4, 9, 3, 2, 5, 6, 3], np.uint16),
    masked_lm_labels=np.array([6, 8]),
    masked_lm_positions=np.array([2, 5]),
    segment_b_start=np.array([5, 4]),
    pair_labels=np.array([0, -1]),
)
EXAMPLE_HEADER = (
    b'{"__metadata__":{"format":"bert-masked-shards","version":"1"},'
    b'"sequence_start":{"dtype":"U32","shape":[3],"data_offsets":[0,12]},'
    b'"prediction_start":{"dtype":"U32","shape":[3],"data_offsets":[12,24]},'
    b'"tokens":{"dtype":"U16","shape":[12],"data_offsets":[24,48]},'
    b'"masked_lm_labels":{"dtype":"U16","shape":[2],"data_offsets":[48,52]},'
    b'"masked_lm_positions":{"dtype":"U16","shape":[2],"data_offsets":[52,56]},'
    b'"segment_b_start":{"dtype":"U16","shape":[2],"data_offsets":[56,60]},'
    b'"pair_labels":{"dtype":"I8","shape":[2],"data_offsets":[60,62]}}'
)
EXAMPLE_DATA = bytes.fromhex(
    "00000000 08000000 0c000000 00000000 02000000 02000000"
    "0200 0500 0400 0700 0300 0400 0900 0300 0200 0500 0600 0300"
    "0600 0800 0200 0500 0500 0400 00 ff"
)


def make_sequences(num_sequences, seed=0):
    """Plain lists: (tokens, segment_b_start, pair_label, positions, labels) for each sequence."""
    random = np.random.default_rng(seed)
    sequences = []
    for _ in range(num_sequences):
        words = random.integers(5, VOCAB_SIZE, random.integers(3, 30)).tolist()
        split = len(words) // 2
        tokens = [2, *words[:split], 3, *words[split:], 3]
        positions = sorted(random.choice(np.arange(split + 2, len(tokens) - 1), 2, replace=False).tolist())
        labels = [tokens[position] for position in positions]
        tokens[positions[0]] = 4
        sequences.append((tokens, split + 2, int(random.integers(0, 2)), positions, labels))
    return sequences


def as_records(sequences, dtype=np.uint16):
    tokens, segment_b_start, pair_labels, positions, labels = zip(*sequences, strict=True)
    return Records(
        sequence_start=np.cumsum([0, *map(len, tokens)]),
        prediction_start=np.cumsum([0, *map(len, labels)]),
        token_ids=np.concatenate(tokens).astype(dtype),
        masked_lm_labels=np.concatenate(labels),
        masked_lm_positions=np.concatenate(positions),
        segment_b_start=np.array(segment_b_start),
        pair_labels=np.array(pair_labels),
    )


def make_folder(folder, sequences, num_shards=3, dtype=np.uint16):
    folder.mkdir()
    tokenizer = make_tokenizer(folder)
    ids = {"pad_id": 0, "unk_id": 1, "cls_id": 2, "sep_id": 3, "mask_id": 4}
    vocab = {"file": "vocab.txt", "sha256": tokenizer.sha256, "size": VOCAB_SIZE, "kind": tokenizer.kind} | ids
    bounds = np.arange(num_shards + 1) * len(sequences) // num_shards
    paths = [folder / f"shard-{i}.safetensors" for i in range(num_shards)]
    for i, path in enumerate(paths):
        write_shard(path, as_records(sequences[bounds[i] : bounds[i + 1]], dtype))
    entries = list(map(shard_entry, paths))
    manifest = make_manifest({"pair_task": "nsp", "seq_length": 32}, vocab, {}, entries)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "shards", make_sequences(50))


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_golden_bytes_of_the_worked_example(tmp_path):
    write_shard(tmp_path / "example.safetensors", EXAMPLE)
    entry = shard_entry(tmp_path / "example.safetensors")
    header = EXAMPLE_HEADER + b" " * (-len(EXAMPLE_HEADER) % 8)
    golden = len(header).to_bytes(8, "little") + header + EXAMPLE_DATA
    assert (tmp_path / "example.safetensors").read_bytes() == golden
    assert list(tmp_path.iterdir()) == [tmp_path / "example.safetensors"], "no temporary file stays"
    assert len(golden) == entry["num_bytes"] == 8 + 536 + 62


def test_the_safetensors_library_reads_a_shard(tmp_path):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    for dtype in (np.uint16, np.uint32):
        records = EXAMPLE._replace(token_ids=EXAMPLE.token_ids.astype(dtype))
        write_shard(tmp_path / "example.safetensors", records)
        loaded = load_file(tmp_path / "example.safetensors")
        wanted = {name.replace("token_ids", "tokens"): array.tolist() for name, array in records._asdict().items()}
        assert {name: array.tolist() for name, array in loaded.items()} == wanted
        assert loaded["tokens"].dtype == loaded["masked_lm_labels"].dtype == dtype


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_gather_gives_any_sequences_in_the_order_asked(tmp_path, dtype):
    sequences = make_sequences(50)
    shards = Shards(make_folder(tmp_path / "shards", sequences, dtype=dtype))
    assert shards.num_sequences == 50
    for indices in ([7], [3, 1, 2], [49, 0, 17, 0, 33, 16], np.random.default_rng(0).permutation(50)):
        records = shards.gather(np.array(indices))
        wanted = [sequences[i] for i in indices]
        assert records.token_ids.tolist() == sum((w[0] for w in wanted), [])
        assert records.lengths.tolist() == [len(w[0]) for w in wanted]
        assert records.segment_b_start.tolist() == [w[1] for w in wanted]
        assert records.pair_labels.tolist() == [w[2] for w in wanted]
        assert records.masked_lm_positions.tolist() == sum((w[3] for w in wanted), [])
        assert records.masked_lm_labels.tolist() == sum((w[4] for w in wanted), [])
        assert records.num_predictions.tolist() == shards.num_predictions(np.array(indices)).tolist()
        assert all(array.dtype == np.int64 for array in records)
    assert np.concatenate([b.token_ids for b in shards.blocks(7)]).tolist() == sum((s[0] for s in sequences), [])


def test_gather_of_nothing_and_out_of_range(folder):
    shards = Shards(folder)
    nothing = shards.gather(np.array([], np.int64))
    assert len(nothing.lengths) == len(nothing.token_ids) == len(nothing.masked_lm_labels) == 0
    for index in (-1, 50):
        with pytest.raises(IndexError, match="folder of 50"):
            shards.gather(np.array([0, index]))


def test_entropy_is_that_of_the_original_tokens(folder):
    originals = [
        token
        for tokens, _, _, positions, labels in make_sequences(50)
        for token in [*np.delete(tokens, positions), *labels]
        if token not in (0, 2, 3, 4)
    ]
    _, counts = np.unique(originals, return_counts=True)
    shares = counts / counts.sum()
    shards = Shards(folder)
    assert unigram_counts(shards).sum() == len(originals)
    assert unigram_entropy(shards) == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-12)


def test_every_flipped_byte_is_found(folder):
    shards = Shards(folder)
    random = np.random.default_rng(0)
    for _ in range(200):
        path = folder / f"shard-{random.integers(0, 3)}.safetensors"
        place, bit = int(random.integers(0, path.stat().st_size)), 1 << int(random.integers(0, 8))
        with open(path, "r+b") as file:
            for turn in ("damage", "mend"):
                file.seek(place)
                byte = file.read(1)[0] ^ bit
                file.seek(place)
                file.write(bytes([byte]))
                file.flush()
                outcome = pytest.raises(ValueError, match=path.name) if turn == "damage" else nullcontext()
                with outcome:
                    verify(shards)


def test_every_flipped_bit_of_the_manifest_is_reported(folder):
    path = folder / "manifest.json"
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for place in random.integers(0, len(whole), 200):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(0, 8))
        path.write_bytes(damaged)
        try:
            manifest = json.loads(damaged)
        except ValueError:
            manifest = None
        same = manifest == json.loads(whole)  # only white space differs
        with nullcontext() if same else pytest.raises(ValueError, match=r"manifest\.json|version"):
            Shards(folder)


def test_damage_that_opening_reports(folder):
    def refused(match):
        with pytest.raises(ValueError, match=match):
            Shards(folder)

    path, whole = folder / "shard-1.safetensors", (folder / "shard-1.safetensors").read_bytes()
    path.write_bytes(whole[:-1])
    refused(r"shard-1.* bytes, the manifest says")
    path.write_bytes(b"\xff" * len(whole))
    refused("no readable shard header")
    path.unlink()
    refused("shard-1.* is missing")
    path.write_bytes(whole)
    Shards(folder)
    (folder / "vocab.txt").write_text("other\n")
    refused("not the one the shards were made with")
    (folder / "vocab.txt").unlink()
    refused("vocab.txt is missing")


def test_folders_that_are_not_shard_folders(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, match in ((tmp_path / "none", "does not exist"), (tmp_path / "empty", "is empty")):
        with pytest.raises(ValueError, match=match):
            Shards(path)
    for changes, match in (({"version": 2}, "version 2.*reads version 1"), ({"format": "other"}, "format 'other'")):
        copy = shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
        edit_manifest(copy, **changes)
        with pytest.raises(ValueError, match=match):
            Shards(copy)
    lacking = {"format": "bert-masked-shards", "version": 1, "config": {}}
    for text, match in (("[]", "format 'list'"), ("{", "not valid JSON"), (json.dumps(lacking), "sha256 differs")):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=match):
            Shards(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="its build has not finished"):
        Shards(folder)


def test_a_shard_is_mapped_not_copied(folder):
    shards = Shards(folder)
    tokens = shards._shards[0].token_ids
    while isinstance(tokens.base, np.ndarray) and not isinstance(tokens, np.memmap):
        tokens = tokens.base
    assert isinstance(tokens, np.memmap)
