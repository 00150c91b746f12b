"""THE masked-shard format: its specification, its writer and its memory-mapped reader.

A shard folder is what `data_prep.build` leaves and the trainer reads:

    shard-00000-of-00002.safetensors, ...   the sequences, shuffled when they were built
    vocab.txt or *.model                    the vocabulary, under its own name
    manifest.json                           written last: a folder without one is unfinished

Why safetensors: a container of plain arrays that numpy can map without a copy, that many programs read, that executes
nothing when opened, and whose rules (8 bytes of header length, a JSON header, the arrays without gaps) fit in this
sentence. Parquet and TFRecord have to be decoded to be read; HDF5 needs its library; a format of our own would need a
tool of its own.

A shard, version 1 (all numbers little-endian)
    header length     uint64; the header ends with spaces, so that this is a multiple of 8 and every array is aligned
    header            JSON: {"__metadata__": {"format": "bert-masked-shards", "version": "1"}, name: {"dtype", "shape",
                      "data_offsets": [first, end]}, ...}, offsets counted from the header's end
    arrays in this order, N sequences, T tokens and P predictions in all:
    sequence_start       uint32 [N + 1]  sequence i is tokens[sequence_start[i] : sequence_start[i + 1]], never padded
    prediction_start     uint32 [N + 1]  likewise for the predictions
    tokens               uint16 [T], or uint32 where the vocabulary has more than 65,536 entries; masks applied
    masked_lm_labels     [P], of the dtype of tokens: the tokens behind the masks
    masked_lm_positions  uint16 [P]      inside the sequence, ascending
    segment_b_start      uint16 [N]      inside the sequence; its length where there is no second segment
    pair_labels          int8 [N]        0 B follows A; 1 B is random (nsp) or A and B are swapped (sop); -1 no pair
A sequence is [CLS] A [SEP] B [SEP], or [CLS] A [SEP]; segment B begins after the first [SEP]. It costs 2 bytes a
token, 4 a prediction and 11 a sequence.

Worked example: "the cat sat" + "it purred" with [CLS]=2 [SEP]=3 [MASK]=4 and the=5 cat=6 sat=7 it=8 purred=9, `cat`
and `it` predicted, and a second sequence "the cat" without a pair, nothing predicted:
    sequence_start 0 8 12         prediction_start 0 2 2
    tokens         2 5 4 7 3 4 9 3   2 5 6 3
    masked_lm_labels 6 8          masked_lm_positions 2 5
    segment_b_start 5 4           pair_labels 0 -1
is a file of 8 + 536 + 62 bytes, the last 62 of which are, row by row:
    00000000 08000000 0c000000                  00000000 02000000 02000000
    0200 0500 0400 0700 0300 0400 0900 0300     0200 0500 0600 0300
    0600 0800                                   0200 0500
    0500 0400                                   00 ff

manifest.json
    {"format": "bert-masked-shards", "version": 1,
     "config": {"seq_length", "max_predictions", "duplicates", "pair_task", "masked_lm_prob", "whole_word", "max_ngram",
                "short_seq_prob", "seed"},
     "vocab": {"file", "sha256", "size", "kind", "pad_id", "unk_id", "cls_id", "sep_id", "mask_id"},
     "corpus": {"num_documents", "num_sentences", "num_tokens", ...},
     "num_sequences", "num_tokens", "num_predictions",
     "shards": [{"file", "sha256", "num_bytes", "num_sequences", "num_tokens", "num_predictions"}, ...],
     "sha256": of all that stands above, as JSON with sorted keys and no spaces}
The folder's sequences are numbered through its shards in this order; the numbers of sequences differ by at most one.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.files import finished_file, read_json, sha256_file

FORMAT, VERSION = "bert-masked-shards", 1
MANIFEST = "manifest.json"
_DTYPES = {"U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "I8": np.dtype("i1")}
_ARRAYS = (
    "sequence_start",
    "prediction_start",
    "tokens",
    "masked_lm_labels",
    "masked_lm_positions",
    "segment_b_start",
    "pair_labels",
)
_COUNTS = ("num_sequences", "num_tokens", "num_predictions")


@dataclass(frozen=True)
class Records:
    """B sequences, unpadded: T tokens and P predictions in all.

    token_ids            int64 [T], masks applied
    lengths              int64 [B], their sum is T
    segment_b_start      int64 [B], inside the sequence; its length where there is no second segment
    pair_labels          int64 [B], 0 in order, 1 random next or swapped, -1 none
    num_predictions      int64 [B], their sum is P
    masked_lm_positions  int64 [P], inside the prediction's sequence
    masked_lm_labels     int64 [P]
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    segment_b_start: np.ndarray
    pair_labels: np.ndarray
    num_predictions: np.ndarray
    masked_lm_positions: np.ndarray
    masked_lm_labels: np.ndarray

    def original_token_ids(self) -> np.ndarray:
        """int64 [T], the tokens before they were masked."""
        sequence_start = np.cumsum(self.lengths) - self.lengths
        token_ids = self.token_ids.copy()
        token_ids[np.repeat(sequence_start, self.num_predictions) + self.masked_lm_positions] = self.masked_lm_labels
        return token_ids


class Shards:
    """A shard folder, open for reading: memory-mapped, any order.

    .folder .manifest .num_sequences .vocab_file (Path)
    Opening checks the manifest, the vocabulary's hash and every shard's size and header; `verify` checks all bytes.
    Raises ValueError where the folder is no shard folder, is unfinished, of another version, damaged, or has another
    vocabulary.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self.vocab_file = self.folder / self.manifest["vocab"]["file"]
        _check_vocabulary(self.vocab_file, self.manifest["vocab"]["sha256"])
        self._arrays = [_map_shard(self.folder, entry) for entry in self.manifest["shards"]]
        sizes = [entry["num_sequences"] for entry in self.manifest["shards"]]
        self._first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.num_sequences = int(self._first[-1])

    def num_predictions(self, indices: np.ndarray) -> np.ndarray:
        """Numbers of predictions, int64 [B], of the sequences `indices` [B]; reads nothing else."""
        num_predictions = np.empty(len(indices), np.int64)
        for arrays, rows, local in self._by_shard(indices):
            num_predictions[rows] = _row_lengths(arrays["prediction_start"], local)
        return num_predictions

    def gather(self, indices: np.ndarray) -> Records:
        """The sequences `indices` [B], in that order. Raises IndexError outside 0 .. num_sequences - 1."""
        parts, order = [], []
        for arrays, rows, local in self._by_shard(indices):
            parts.append(_gather_from(arrays, local))
            order.append(rows)
        if len(parts) == 1:
            return parts[0]
        return _reordered(parts, np.concatenate(order))

    def blocks(self, num_sequences: int = 8192) -> Iterator[Records]:
        """All sequences from first to last, `num_sequences` at a time."""
        for first in range(0, self.num_sequences, num_sequences):
            yield self.gather(np.arange(first, min(first + num_sequences, self.num_sequences)))

    def _by_shard(self, indices: np.ndarray) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]]:
        """(arrays, rows of `indices` that lie in this shard, their places in it) of each shard that is asked."""
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.num_sequences:
            raise IndexError(f"sequences {indices.min()} .. {indices.max()} of a folder of {self.num_sequences}")
        shard_of = np.searchsorted(self._first, indices, side="right") - 1
        # An empty request goes to the first shard, which gives it arrays of the right kind.
        for shard in np.unique(shard_of) if len(indices) else [0]:
            rows = np.flatnonzero(shard_of == shard)
            yield self._arrays[shard], rows, indices[rows] - self._first[shard]


def write_shard(path: str | Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays of one shard, named and shaped as in the specification.

    Integer arrays are cast to the format's dtypes; `tokens` must already be uint16 or uint32. Written under a
    temporary name, fsynced, renamed. Raises ValueError for more tokens than uint32 can count.
    """
    tokens = arrays["tokens"]
    if len(tokens) >= 1 << 32:
        raise ValueError(f"a shard of {len(tokens):,} tokens exceeds the format's {1 << 32:,}; raise --num-shards")
    dtypes = dict(zip(_ARRAYS, ("<u4", "<u4", tokens.dtype, tokens.dtype, "<u2", "<u2", "i1"), strict=True))
    columns = {name: np.ascontiguousarray(arrays[name], np.dtype(dtype)) for name, dtype in dtypes.items()}
    tensors = {name: (column.dtype, column.shape) for name, column in columns.items()}
    path = Path(path)
    with finished_file(path) as file:
        file.write(safetensors_header(tensors, {"format": FORMAT, "version": str(VERSION)}))
        for column in columns.values():
            file.write(column.data)


def safetensors_header(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a safetensors file, up to the first tensor.

    `tensors` maps names to dtype and shape, in the order in which the tensors follow without gaps. The specification:
    https://github.com/huggingface/safetensors#format
    """
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        code = f"{dtype.kind}{8 * dtype.itemsize}".upper()  # "U16", "F32"
        header[name] = {"dtype": code, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
    return len(text).to_bytes(8, "little") + text


def shard_entry(path: Path) -> dict:
    """The manifest entry of a finished shard file, read from its bytes."""
    arrays = _map_arrays(path)
    return {
        "file": path.name,
        "sha256": sha256_file(path),
        "num_bytes": path.stat().st_size,
        "num_sequences": len(arrays["pair_labels"]),
        "num_tokens": len(arrays["tokens"]),
        "num_predictions": len(arrays["masked_lm_labels"]),
    }


def make_manifest(config: dict, vocab: dict, corpus: dict, shards: list[dict]) -> dict:
    """The manifest of a folder: what was asked, from what it was made, and the entries of its shards."""
    totals = {count: sum(entry[count] for entry in shards) for count in _COUNTS}
    identity = {"format": FORMAT, "version": VERSION}
    manifest = identity | {"config": config, "vocab": vocab, "corpus": corpus} | totals | {"shards": shards}
    return manifest | {"sha256": _manifest_sha256(manifest)}


def _manifest_sha256(manifest: dict) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def verify(shards: Shards, progress=iter) -> None:
    """Compare every byte of every shard with its checksum; ValueError names all shards that are damaged.

    `progress` wraps the iteration over the shards' entries, such as a tqdm bar.
    """
    entries = progress(shards.manifest["shards"])
    damaged = [entry["file"] for entry in entries if sha256_file(shards.folder / entry["file"]) != entry["sha256"]]
    if damaged:
        raise ValueError(
            f"{shards.folder}: the bytes of {', '.join(damaged)} are not those that were written (sha256 differs); "
            "copy them again or rebuild the folder with `python -m data_prep.build`"
        )


def unigram_counts(shards: Shards) -> np.ndarray:
    """How often each token occurs in the original, unmasked sequences: int64 [V].

    [PAD], [CLS], [SEP] and [MASK] count 0: they are never predicted.
    """
    vocab = shards.manifest["vocab"]
    counts = np.zeros(vocab["size"], np.int64)
    for records in shards.blocks():
        counts += np.bincount(records.original_token_ids(), minlength=vocab["size"])
    counts[[vocab["pad_id"], vocab["cls_id"], vocab["sep_id"], vocab["mask_id"]]] = 0
    return counts


def unigram_entropy(shards: Shards) -> float:
    """Entropy in nats of the folder's own token frequencies, special tokens apart: the MLM loss of a model that knows
    these and nothing of the context.
    """
    return entropy(unigram_counts(shards))


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the shares that `counts` [V] make."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _read_manifest(folder: Path) -> dict:
    advice = "make one with `python -m data_prep.build`"
    if not folder.is_dir():
        raise ValueError(f"shard folder {folder} does not exist or is no folder; {advice}")
    if not any(folder.iterdir()):
        raise ValueError(f"shard folder {folder} is empty; {advice}")
    if not (folder / MANIFEST).exists():
        raise ValueError(f"{folder} has no {MANIFEST}: it is no shard folder or its build has not finished; {advice}")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ValueError(f"{folder / MANIFEST} has format {found!r} where {FORMAT!r} is needed; {advice}")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{folder} holds shards of version {manifest.get('version')}, this program reads version {VERSION}; "
            "rebuild the folder or use the program's version that wrote it"
        )
    if manifest.get("sha256") != _manifest_sha256(manifest):
        raise ValueError(f"{folder / MANIFEST} is not as it was written (sha256 differs): copy it again or {advice}")
    return manifest


def _check_vocabulary(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise ValueError(
            f"vocabulary {path} is missing; copy it there from the corpus folder that the shards were made from"
        )
    if (found := sha256_file(path)) != sha256:
        raise ValueError(
            f"vocabulary {path} (sha256 {found[:12]}) is not the one the shards were made with ({sha256[:12]}); "
            "put that one back"
        )


def _map_shard(folder: Path, entry: dict) -> dict[str, np.ndarray]:
    path = folder / entry["file"]
    num_bytes = path.stat().st_size if path.is_file() else None
    if num_bytes != entry["num_bytes"]:
        found = "is missing" if num_bytes is None else f"has {num_bytes:,} bytes"
        raise ValueError(
            f"{path} {found}, the manifest says {entry['num_bytes']:,}; copy it again or rebuild the folder"
        )
    arrays = _map_arrays(path)
    lengths = len(arrays["pair_labels"]), len(arrays["tokens"]), len(arrays["masked_lm_labels"])
    if lengths != tuple(entry[count] for count in _COUNTS):
        raise ValueError(
            f"{path} holds {lengths} {_COUNTS}, the manifest says otherwise; copy it again or rebuild the folder"
        )
    return arrays


def _map_arrays(path: Path) -> dict[str, np.ndarray]:
    """Views of a shard's arrays in the mapped file; nothing is copied."""
    file = np.memmap(path, np.uint8, mode="r")
    begin = 8 + int.from_bytes(file[:8].tobytes(), "little")
    try:
        header = json.loads(file[8:begin].tobytes())
        arrays = {name: _view(file[begin:], header[name]) for name in _ARRAYS}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has no readable shard header; copy it again or rebuild the folder") from error
    return arrays


def _view(data: np.ndarray, column: dict) -> np.ndarray:
    begin, end = column["data_offsets"]
    return np.asarray(data[begin:end]).view(_DTYPES[column["dtype"]]).reshape(column["shape"])


def _gather_from(arrays: dict[str, np.ndarray], local: np.ndarray) -> Records:
    """The sequences `local` [B] of one shard."""
    lengths = _row_lengths(arrays["sequence_start"], local)
    num_predictions = _row_lengths(arrays["prediction_start"], local)
    tokens = _ragged_range(arrays["sequence_start"][local], lengths)
    predictions = _ragged_range(arrays["prediction_start"][local], num_predictions)
    return Records(
        token_ids=arrays["tokens"][tokens].astype(np.int64),
        lengths=lengths,
        segment_b_start=arrays["segment_b_start"][local].astype(np.int64),
        pair_labels=arrays["pair_labels"][local].astype(np.int64),
        num_predictions=num_predictions,
        masked_lm_positions=arrays["masked_lm_positions"][predictions].astype(np.int64),
        masked_lm_labels=arrays["masked_lm_labels"][predictions].astype(np.int64),
    )


def _reordered(parts: list[Records], rows: np.ndarray) -> Records:
    """Join `parts`, whose sequences belong at `rows` [B] of the result."""
    order = np.argsort(rows)

    def rows_of(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])[order]

    def ragged(name: str, counts: str) -> np.ndarray:
        lengths = np.concatenate([getattr(part, counts) for part in parts])
        starts = np.cumsum(lengths) - lengths
        return np.concatenate([getattr(part, name) for part in parts])[_ragged_range(starts[order], lengths[order])]

    return Records(
        token_ids=ragged("token_ids", "lengths"),
        lengths=rows_of("lengths"),
        segment_b_start=rows_of("segment_b_start"),
        pair_labels=rows_of("pair_labels"),
        num_predictions=rows_of("num_predictions"),
        masked_lm_positions=ragged("masked_lm_positions", "num_predictions"),
        masked_lm_labels=ragged("masked_lm_labels", "num_predictions"),
    )


def _row_lengths(starts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return starts[rows + 1].astype(np.int64) - starts[rows]


def _ragged_range(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (lengths[0] of them), then starts[1], ...: int64 [sum of lengths]."""
    ends = np.cumsum(lengths)
    return np.repeat(starts.astype(np.int64) - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)
