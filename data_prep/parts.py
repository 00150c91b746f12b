"""A corpus in parts, so that any number of processes and hosts can make it, and none of them starts again from nothing.

The input files, in order, form volumes of about VOLUME_BYTES on disk; the documents of a volume form parts of about
PART_CHARACTERS, or of PART_DOCUMENTS where they are tiny. All this follows from the input alone, and so does a part's
content: who makes it, and when, does not matter. OUTPUT/parts holds, until the corpus is finished,

    part-VVVVV-BBBBB.safetensors   part B of volume V (see Part)
    volume-VVVVV.json              {"num_parts": N, "digest": D}, known to whoever has read the volume to its end

Slice I of N makes whole volumes where there are enough for all, since it then need not read the others; else every
N-th part. Slices that share a volume compare its digest, so that a host with another text cannot mix it in.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save

from data_prep.files import finished_file, read_json, write_json
from data_prep.text.documents import Document, count_skips, input_bytes, read_documents

VOLUME_BYTES = 1 << 28
PART_CHARACTERS = 4_000_000
PART_DOCUMENTS = 50_000


class Source(NamedTuple):
    """Documents of one part, as read, and what was skipped between them, counted by reason."""

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
    signatures      uint32 [D, permutations], for near-duplicates; [D, 0] where nobody asked
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


def volume_file(folder: Path, volume: int) -> Path:
    return folder / f"volume-{volume:05d}.json"


def missing_sources(
    folder: Path,
    files: list[Path],
    format: str,
    text_key: str,
    slice: tuple[int, int],
    tell: Callable[[str], object],
    progress: Callable[[int], object],
) -> Iterator[Source]:
    """What has still to be tokenised of slice (I, N): the documents of each part that has no file yet, in order."""
    index, count = slice
    groups = volumes(files)
    by_volume = len(groups) >= count
    for volume, group in enumerate(groups):
        if by_volume and volume % count != index:
            continue
        if by_volume and _is_complete(folder, volume):
            progress(input_bytes(group))
            continue
        number, digest = -1, hashlib.blake2b(digest_size=16)
        for number, source in enumerate(_sources(volume, group, format, text_key, tell, progress)):
            for document in source.documents:
                digest.update(document.text.encode())
            mine = by_volume or (volume + number) % count == index
            if mine and not part_file(folder, volume, number).exists():
                yield source
        _write_end(volume_file(folder, volume), {"num_parts": number + 1, "digest": digest.hexdigest()})


def _write_end(path: Path, end: dict) -> None:
    if path.exists() and read_json(path) != end:
        raise ValueError(
            f"{path}: another slice read other text in these files; they changed, or differ between hosts: "
            f"remove {path.parent.parent} and begin again with the same files everywhere"
        )
    write_json(path, end)


def _sources(volume: int, files: list[Path], format: str, text_key: str, tell, progress) -> Iterator[Source]:
    skipped: Counter[str] = Counter()
    documents: list[Document] = []
    number, size = 0, 0
    for document in read_documents(files, format, text_key, count_skips(skipped, tell), progress):
        documents.append(document)
        size += len(document.text)
        if size >= PART_CHARACTERS or len(documents) == PART_DOCUMENTS:
            yield Source(volume, number, documents, Counter(skipped))
            skipped.clear()
            documents, number, size = [], number + 1, 0
    if documents or skipped:
        yield Source(volume, number, documents, Counter(skipped))


def _is_complete(folder: Path, volume: int) -> bool:
    """Whether the volume was read to its end and all of its parts are there."""
    end = volume_file(folder, volume)
    return end.exists() and all(
        part_file(folder, volume, number).exists() for number in range(read_json(end)["num_parts"])
    )


def finished_parts(folder: Path, files: list[Path]) -> list[Path]:
    """All part files in order. Raises ValueError where slices have not made theirs yet."""
    paths = []
    for volume in range(len(volumes(files))):
        end = volume_file(folder, volume)
        if not end.exists():
            raise ValueError(_unfinished(folder, f"volume {volume} was not read to its end"))
        paths += [part_file(folder, volume, number) for number in range(read_json(end)["num_parts"])]
    if absent := [path.name for path in paths if not path.exists()]:
        raise ValueError(_unfinished(folder, f"{len(absent)} of {len(paths)} parts are missing, the first {absent[0]}"))
    return paths


def _unfinished(folder: Path, what: str) -> str:
    return (
        f"{folder.parent} is not complete: {what}; give all its --slice commands again (what is done is not done "
        "again), then --finish"
    )


def write_part(path: Path, part: Part) -> None:
    """Write a part whole or not at all."""
    tensors = {name: np.ascontiguousarray(value) for name, value in part._asdict().items() if name != "counts"}
    with finished_file(path) as file:
        file.write(save(tensors, {"counts": json.dumps(part.counts, sort_keys=True)}))


def read_part(path: Path) -> Part:
    """Read a part. ValueError names a file that is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return Part(**tensors, counts=json.loads(file.metadata()["counts"]))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and give its --slice command again") from error


def kept_of(part: Part, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token_ids, lengths, num_sentences) of the documents with keep bool [D]."""
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
