"""A corpus in parts, so that any number of processes and hosts can make it and an interruption loses little.

The input files are grouped, in order, into volumes of about VOLUME_BYTES on disk. The documents of a volume are grouped
into parts of about PART_CHARACTERS, or of PART_DOCUMENTS if they are tiny. The bounds and the content of a part depend
on the input alone. Until the corpus is finished, OUTPUT/parts holds

    part-VVVVV-BBBBB.safetensors   part B of volume V (see Part)
    volume-VVVVV.json              {"num_parts": N, "digest": D}, written by a process that read the volume to its end

If there are at least N volumes, slice I of N makes whole volumes and need not read the others. Otherwise it makes every
N-th part. Slices that share a volume compare its digest, so that a host that reads different text gets an error.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from data_prep.cli import InputOptions
from data_prep.files import finished_file, read_json, write_json
from data_prep.slices import require_made
from data_prep.text.documents import Document, count_skips, input_bytes, read_documents

VOLUME_BYTES = 1 << 28
PART_CHARACTERS = 4_000_000
PART_DOCUMENTS = 50_000


class Source(NamedTuple):
    """The documents of one part, as read, and the number of documents skipped between them, by reason."""

    volume: int
    number: int
    documents: list[Document]
    skipped: Counter[str]


class Part(NamedTuple):
    """D tokenised documents of S sentences and T tokens.

    token_ids       uint16 or int32 [T]
    lengths         int32 [S], tokens of each sentence
    num_sentences   int32 [D]
    num_characters  int32 [D]
    fingerprints    uint64 [D, 2], for exact duplicates
    signatures      uint32 [D, permutations], for near-duplicates; [D, 0] if near-duplicates are kept
    counts          what was dropped, skipped and scrubbed: {"dropped": {...}, ...}
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    num_sentences: np.ndarray
    num_characters: np.ndarray
    fingerprints: np.ndarray
    signatures: np.ndarray
    counts: dict[str, dict[str, int]]


def volumes(files: list[Path]) -> list[list[Path]]:
    """The files in order, in groups of about VOLUME_BYTES."""
    groups: list[list[Path]] = []
    size = VOLUME_BYTES
    for file in files:
        if size >= VOLUME_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += input_bytes([file])
    return groups


def part_file(folder: Path, volume: int, number: int) -> Path:
    return folder / f"part-{volume:05d}-{number:05d}.safetensors"


def _volume_file(folder: Path, volume: int) -> Path:
    return folder / f"volume-{volume:05d}.json"


def missing_sources(
    folder: Path, files: list[Path], options: InputOptions, slice: tuple[int, int], bar: tqdm
) -> Iterator[Source]:
    """The missing parts of slice (I, N), in order. `bar` counts the files' bytes and shows the first skips above it."""
    index, count = slice
    groups = volumes(files)
    by_volume = len(groups) >= count
    for volume, group in enumerate(groups):
        if by_volume and volume % count != index:
            continue
        if by_volume and _is_complete(folder, volume):
            bar.update(input_bytes(group))
            continue
        num_parts, digest = 0, hashlib.blake2b(digest_size=16)
        for source in _sources(volume, group, options, bar):
            num_parts += 1
            for document in source.documents:
                digest.update(document.text.encode())
            is_ours = by_volume or (volume + source.number) % count == index
            if is_ours and not part_file(folder, volume, source.number).exists():
                yield source
        _write_end(_volume_file(folder, volume), {"num_parts": num_parts, "digest": digest.hexdigest()})


def _write_end(path: Path, end: dict) -> None:
    if path.exists() and read_json(path) != end:
        raise ValueError(
            f"{path}: another slice read different text from these files, so they changed or differ between hosts; "
            f"remove {path.parent.parent} and start again with the same files everywhere"
        )
    write_json(path, end)


def _sources(volume: int, files: list[Path], options: InputOptions, bar: tqdm) -> Iterator[Source]:
    skipped: Counter[str] = Counter()
    documents: list[Document] = []
    number, size = 0, 0
    skip = count_skips(skipped, bar.write)
    for document in read_documents(files, options.format, options.text_key, skip, bar.update):
        documents.append(document)
        size += len(document.text)
        if size >= PART_CHARACTERS or len(documents) == PART_DOCUMENTS:
            yield Source(volume, number, documents, Counter(skipped))
            skipped.clear()
            documents, number, size = [], number + 1, 0
    if documents or skipped:
        yield Source(volume, number, documents, Counter(skipped))


def _part_files(folder: Path, volume: int) -> list[Path]:
    """The paths of all parts of a volume that was read to its end; some may not exist."""
    num_parts = read_json(_volume_file(folder, volume))["num_parts"]
    return [part_file(folder, volume, number) for number in range(num_parts)]


def _is_complete(folder: Path, volume: int) -> bool:
    return _volume_file(folder, volume).exists() and all(path.exists() for path in _part_files(folder, volume))


def finished_parts(folder: Path, files: list[Path]) -> list[Path]:
    """All part files in order. Raises ValueError if one is missing."""
    numbers = range(len(volumes(files)))
    require_made(folder.parent, [_volume_file(folder, volume) for volume in numbers], "volumes")
    paths = [path for volume in numbers for path in _part_files(folder, volume)]
    require_made(folder.parent, paths, "parts")
    return paths


def write_part(path: Path, part: Part) -> None:
    """Write a part atomically."""
    tensors = {name: np.ascontiguousarray(value) for name, value in part._asdict().items() if name != "counts"}
    with finished_file(path) as file:
        file.write(save(tensors, {"counts": json.dumps(part.counts, sort_keys=True)}))


def read_part(path: Path) -> Part:
    """Read a part. Raises ValueError, with the name of the file, if it is damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return Part(**tensors, counts=json.loads(file.metadata()["counts"]))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and give its --slice command again") from error


def kept_of(part: Part, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token_ids, lengths, num_sentences) of the documents where `keep`, bool [D], is true."""
    keep_sentence = np.repeat(keep, part.num_sentences)
    return part.token_ids[np.repeat(keep_sentence, part.lengths)], part.lengths[keep_sentence], part.num_sentences[keep]


def overview(paths: Iterable[Path]) -> tuple[np.ndarray, dict[str, Counter[str]]]:
    """The fingerprints of all parts, uint64 [D, 2], and the sum of their counts by kind."""
    fingerprints: list[np.ndarray] = []
    total: dict[str, Counter[str]] = {}
    for part in map(read_part, paths):
        fingerprints.append(part.fingerprints)
        for kind, counts in part.counts.items():
            total.setdefault(kind, Counter()).update(counts)
    return np.concatenate(fingerprints), total
