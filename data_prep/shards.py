"""The masked-shard format: its specification, its writer and its memory-mapped reader.

A shard folder is written by `data_prep.build` and read by the trainer:

    shard-00000-of-00002.safetensors, ...   the sequences, in the shuffled order of the build
    vocab.txt or *.model                    the vocabulary under its own name
    manifest.json                           written last: a folder without it is not finished

Shards are safetensors files: plain arrays after a JSON header. numpy maps them without a copy, many programs read them,
and they cannot contain code. Parquet and TFRecord would have to be decoded, and HDF5 needs its own library.

A shard, version 1 (all numbers are little-endian)
    header length     uint64; the header is padded with spaces to a multiple of 8 bytes
    header            JSON: {"__metadata__": {"format": "bert-masked-shards", "version": "1"}, name: {"dtype", "shape",
                      "data_offsets": [first, end]}, ...}; offsets count from the end of the header
    these arrays in this order, for N sequences, T tokens and P predictions:
    sequence_start       uint32 [N + 1]  sequence i is tokens[sequence_start[i] : sequence_start[i + 1]], unpadded
    prediction_start     uint32 [N + 1]  the same for the predictions
    tokens               uint16 [T], or uint32 if the vocabulary has more than 65,536 entries; already masked
    masked_lm_labels     [P], with the dtype of tokens: the original tokens at the predicted positions
    masked_lm_positions  uint16 [P]      within the sequence, ascending
    segment_b_start      uint16 [N]      within the sequence; the sequence's length if there is no second segment
    pair_labels          int8 [N]        0: B follows A; 1: B is random (nsp) or A and B are swapped (sop); -1: no pair
A sequence is [CLS] A [SEP] B [SEP], or [CLS] A [SEP]; segment B begins after the first [SEP]. With uint16 tokens, a
token takes 2 bytes, a prediction 4 and a sequence 11.

Worked example with the vocabulary [CLS]=2 [SEP]=3 [MASK]=4 the=5 cat=6 sat=7 it=8 purred=9. The first sequence is
"the cat sat" + "it purred" with `cat` and `it` predicted; the second is "the cat" without a pair or predictions:
    sequence_start 0 8 12         prediction_start 0 2 2
    tokens         2 5 4 7 3 4 9 3   2 5 6 3
    masked_lm_labels 6 8          masked_lm_positions 2 5
    segment_b_start 5 4           pair_labels 0 -1
The file has 8 + 536 + 62 bytes. The last 62 are:
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
     "sha256": of everything above, as JSON with sorted keys and no spaces}
Samples are numbered across the shards in this order. Any two shards differ in size by at most one sequence.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.files import finished_file, read_json, sha256_file

FORMAT, VERSION = "bert-masked-shards", 1
MANIFEST = "manifest.json"
_DTYPES = {"U32": "<u4", "U16": "<u2", "I8": "i1"}
_COUNTS = ("num_sequences", "num_tokens", "num_predictions")
_ADVICE = "make one with `python -m data_prep.build`"
_REPAIR = "copy it again or rebuild the folder"


class Records(NamedTuple):
    """B sequences with T tokens and P predictions in all, as the arrays of a shard (see above)."""

    sequence_start: np.ndarray  # [B + 1]
    prediction_start: np.ndarray  # [B + 1]
    token_ids: np.ndarray  # [T], the array `tokens` of a shard
    masked_lm_labels: np.ndarray  # [P]
    masked_lm_positions: np.ndarray  # [P], within the sequence
    segment_b_start: np.ndarray  # [B], within the sequence
    pair_labels: np.ndarray  # [B]

    @property
    def lengths(self) -> np.ndarray:
        """[B]: the number of tokens of each sequence."""
        return np.diff(self.sequence_start)

    @property
    def num_predictions(self) -> np.ndarray:
        """[B]: the number of predictions of each sequence."""
        return np.diff(self.prediction_start)

    def masked_lm_rows(self) -> np.ndarray:
        """[P]: the index of each prediction in `token_ids`."""
        return np.repeat(self.sequence_start[:-1], self.num_predictions) + self.masked_lm_positions

    def original_token_ids(self) -> np.ndarray:
        """[T]: a copy of the tokens as they were before masking."""
        token_ids = self.token_ids.copy()
        token_ids[self.masked_lm_rows()] = self.masked_lm_labels
        return token_ids

    def take(self, rows: np.ndarray) -> "Records":
        """Copies of the sequences `rows` [B], in that order, as int64 arrays."""
        tokens, sequence_start = _select_runs(self.sequence_start, rows)
        predictions, prediction_start = _select_runs(self.prediction_start, rows)
        taken = Records(
            sequence_start,
            prediction_start,
            self.token_ids[tokens],
            self.masked_lm_labels[predictions],
            self.masked_lm_positions[predictions],
            self.segment_b_start[rows],
            self.pair_labels[rows],
        )
        return Records(*(array.astype(np.int64, copy=False) for array in taken))


_ARRAYS = ("sequence_start", "prediction_start", "tokens", *Records._fields[3:])  # their names in a shard


def join_records(parts: Sequence[Records]) -> Records:
    """The sequences of all parts, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    return Records(*map(np.concatenate, zip(*parts, strict=True)))._replace(
        sequence_start=starts_of(np.concatenate([part.lengths for part in parts])),
        prediction_start=starts_of(np.concatenate([part.num_predictions for part in parts])),
    )


def starts_of(lengths: np.ndarray | list[int]) -> np.ndarray:
    """int64 [B + 1]: where each of B consecutive runs of `lengths` [B] begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _select_runs(starts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The indices of all elements of the runs `rows` [B], and where each run begins among these indices, [B + 1]."""
    first = starts[rows].astype(np.int64)
    lengths = starts[rows + 1] - first
    selected_start = starts_of(lengths)
    return np.repeat(first - selected_start[:-1], lengths) + np.arange(selected_start[-1]), selected_start


class Shards:
    """A shard folder open for reading. Its files are memory-mapped, so that samples can be read in any order.

    Attributes: folder, manifest, num_sequences, vocab_file (a Path).
    Opening checks the manifest, the hash of the vocabulary, and the size and header of every shard; `verify` checks
    all bytes. Raises ValueError if the folder is not a shard folder, is not finished, has another version, is damaged
    or holds another vocabulary.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self.vocab_file = self.folder / self.manifest["vocab"]["file"]
        _check_vocabulary(self.vocab_file, self.manifest["vocab"]["sha256"])
        self._shards = [_map_shard(self.folder, entry) for entry in self.manifest["shards"]]
        self._first = starts_of([entry["num_sequences"] for entry in self.manifest["shards"]])
        self.num_sequences = int(self._first[-1])

    def num_predictions(self, samples: np.ndarray) -> np.ndarray:
        """int64 [B]: the number of predictions of each of the `samples` [B]. No other array is read."""
        num_predictions = np.empty(len(samples), np.int64)
        for shard, places, rows in self._by_shard(samples):
            num_predictions[places] = shard.prediction_start[rows + 1] - shard.prediction_start[rows]
        return num_predictions

    def gather(self, samples: np.ndarray) -> Records:
        """The sequences `samples` [B] in that order, as int64. Raises IndexError outside 0 .. num_sequences - 1."""
        found = [(shard.take(rows), places) for shard, places, rows in self._by_shard(samples)]
        parts, places = zip(*found, strict=True)
        joined = join_records(parts)
        return joined if len(parts) == 1 else joined.take(np.argsort(np.concatenate(places)))

    def blocks(self, num_sequences: int = 8192) -> Iterator[Records]:
        """All sequences from first to last, `num_sequences` at a time."""
        for first in range(0, self.num_sequences, num_sequences):
            yield self.gather(np.arange(first, min(first + num_sequences, self.num_sequences)))

    def _by_shard(self, samples: np.ndarray) -> Iterator[tuple[Records, np.ndarray, np.ndarray]]:
        """(shard, places in `samples`, rows in the shard) for each shard that holds some of the `samples`."""
        samples = np.asarray(samples, np.int64)
        if len(samples) and not 0 <= samples.min() <= samples.max() < self.num_sequences:
            raise IndexError(f"sequences {samples.min()} .. {samples.max()} of a folder of {self.num_sequences}")
        shard_of = np.searchsorted(self._first, samples, side="right") - 1
        # An empty request goes to the first shard, which answers it with empty arrays of the right dtype.
        for shard in np.unique(shard_of) if len(samples) else [0]:
            places = np.flatnonzero(shard_of == shard)
            yield self._shards[shard], places, samples[places] - self._first[shard]


def write_shard(path: str | Path, records: Records) -> None:
    """Write one shard atomically. Raises ValueError for more tokens than uint32 can count.

    Tokens and labels get the dtype of `records.token_ids`, uint16 or uint32; other arrays are cast to the format's.
    """
    token_type = records.token_ids.dtype
    assert token_type in (np.uint16, np.uint32), token_type
    if (num_tokens := len(records.token_ids)) >= 1 << 32:
        raise ValueError(f"a shard of {num_tokens:,} tokens exceeds the format's {1 << 32:,}; raise --num-shards")
    dtypes = ("<u4", "<u4", token_type, token_type, "<u2", "<u2", "i1")
    arrays = [np.ascontiguousarray(column, dtype) for column, dtype in zip(records, dtypes, strict=True)]
    tensors = {name: (array.dtype, array.shape) for name, array in zip(_ARRAYS, arrays, strict=True)}
    with finished_file(path) as file:
        file.write(safetensors_header(tensors, {"format": FORMAT, "version": str(VERSION)}))
        for array in arrays:
            file.write(array.data)


def safetensors_header(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file before its first tensor (https://github.com/huggingface/safetensors#format).

    `tensors` maps names to dtype and shape, in the order of the file, which has no gaps between them.
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
    counts = dict(zip(_COUNTS, _count(_map_arrays(path)), strict=True))
    return {"file": path.name, "sha256": sha256_file(path), "num_bytes": path.stat().st_size} | counts


def make_manifest(config: dict, vocab: dict, corpus: dict, shards: list[dict]) -> dict:
    """The content of manifest.json. `shards` holds the entries of the shards, in order."""
    manifest = {"format": FORMAT, "version": VERSION, "config": config, "vocab": vocab, "corpus": corpus}
    manifest |= {count: sum(entry[count] for entry in shards) for count in _COUNTS} | {"shards": shards}
    return manifest | {"sha256": _manifest_sha256(manifest)}


def _manifest_sha256(manifest: dict) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def verify(shards: Shards, progress: Callable[[list[dict]], Iterable[dict]] = iter) -> None:
    """Compare all shards with their checksums; a ValueError names the damaged ones. `progress` wraps the iteration."""
    entries = progress(shards.manifest["shards"])
    damaged = [entry["file"] for entry in entries if sha256_file(shards.folder / entry["file"]) != entry["sha256"]]
    if damaged:
        raise ValueError(
            f"{shards.folder}: the bytes of {', '.join(damaged)} have changed since they were written (sha256 differs)"
            "; copy them again or rebuild the folder with `python -m data_prep.build`"
        )


def unigram_counts(shards: Shards) -> np.ndarray:
    """int64 [V]: counts of the tokens before masking; 0 for [PAD], [CLS], [SEP], [MASK], which are never predicted."""
    vocab = shards.manifest["vocab"]
    counts = np.zeros(vocab["size"], np.int64)
    for records in shards.blocks():
        counts += np.bincount(records.original_token_ids(), minlength=vocab["size"])
    counts[[vocab["pad_id"], vocab["cls_id"], vocab["sep_id"], vocab["mask_id"]]] = 0
    return counts


def unigram_entropy(shards: Shards) -> float:
    """Entropy in nats of `unigram_counts`: the masked-LM loss of a model that only knows the token frequencies."""
    return entropy(unigram_counts(shards))


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that is proportional to `counts` [V]."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError(f"shard folder {folder} does not exist or is not a folder; {_ADVICE}")
    if not any(folder.iterdir()):
        raise ValueError(f"shard folder {folder} is empty; {_ADVICE}")
    if not path.exists():
        raise ValueError(f"{folder} has no {MANIFEST}: not a shard folder, or its build has not finished; {_ADVICE}")
    manifest = read_json(path)
    found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r} where {FORMAT!r} is needed; {_ADVICE}")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{folder} holds shards of version {manifest.get('version')}, this program reads version {VERSION}; "
            "rebuild the folder or use the program's version that wrote it"
        )
    if manifest.get("sha256") != _manifest_sha256(manifest):
        raise ValueError(f"{path} has changed since it was written (sha256 differs): copy it again or {_ADVICE}")
    return manifest


def _check_vocabulary(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise ValueError(f"vocabulary {path} is missing; copy it from the corpus folder that the shards were made from")
    if (found := sha256_file(path)) != sha256:
        raise ValueError(
            f"vocabulary {path} (sha256 {found[:12]}) is not the one the shards were made with ({sha256[:12]}); "
            "put that one back"
        )


def _map_shard(folder: Path, entry: dict) -> Records:
    """Map a shard and compare its size and counts with its entry in the manifest."""
    path = folder / entry["file"]
    num_bytes = path.stat().st_size if path.is_file() else None
    if num_bytes != entry["num_bytes"]:
        found = "is missing" if num_bytes is None else f"has {num_bytes:,} bytes"
        raise ValueError(f"{path} {found}, the manifest says {entry['num_bytes']:,}; {_REPAIR}")
    shard = _map_arrays(path)
    if (counts := _count(shard)) != tuple(entry[name] for name in _COUNTS):
        raise ValueError(f"{path} holds {counts} {_COUNTS}, which differs from the manifest; {_REPAIR}")
    return shard


def _count(shard: Records) -> tuple[int, int, int]:
    """The numbers of sequences, tokens and predictions."""
    return len(shard.pair_labels), len(shard.token_ids), len(shard.masked_lm_labels)


def _map_arrays(path: Path) -> Records:
    """Views of a shard's arrays in the mapped file; nothing is copied."""
    file = np.memmap(path, np.uint8, mode="r")
    data_start = 8 + int.from_bytes(file[:8].tobytes(), "little")
    try:
        header = json.loads(file[8:data_start].tobytes())
        return Records(*(_view(file[data_start:], header[name]) for name in _ARRAYS))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has no readable shard header; {_REPAIR}") from error


def _view(data: np.ndarray, tensor: dict) -> np.ndarray:
    begin, end = tensor["data_offsets"]
    return np.asarray(data[begin:end]).view(_DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
