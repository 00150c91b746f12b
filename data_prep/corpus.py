"""Command line: documents -> Megatron's .bin and .idx, one sequence a sentence, with document bounds.

    python -m data_prep.corpus --input books/ --vocab vocab/ --output corpus/ --workers 4

Tokenising is done once; shards of any sequence length are built from it. DIR then holds

    corpus.bin corpus.idx    the tokens (see indexed_dataset.py)
    punkt.json               the sentence model, trained on a sample of the same input
    spm.model or vocab.txt   the vocabulary
    config.json              the resolved options
    manifest.json            counts, what each filter dropped, and the sha256 of every file

The bytes do not depend on the number of workers: one process reads, decides on duplicates and writes, in the order
of the input.
"""

import argparse
import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_prep.cleaning import fingerprint, normalise, paragraphs
from data_prep.cli import claim_output, read_json, run_cli, sha256_file, write_json
from data_prep.documents import (
    Document,
    add_input_arguments,
    count_skips,
    input_bytes,
    input_config,
    read_documents,
    require_text,
    sample_documents,
)
from data_prep.indexed_dataset import IndexedDatasetWriter, read_indexed_dataset, token_type
from data_prep.sentences import SentenceSplitter, load_splitter, train_splitter
from data_prep.tokenizer import Tokenizer, load_tokenizer

BATCH_CHARACTERS = 500_000  # what a worker is handed at a time


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus: D documents of S sentences of T tokens.

    token_ids       memory map, uint16 or int32 [T]
    sentence_start  int64 [S+1], in tokens
    document_start  int64 [D+1], in sentences
    manifest        what corpus.py wrote beside it; None for a corpus that Megatron's own tools made
    """

    token_ids: np.ndarray
    sentence_start: np.ndarray
    document_start: np.ndarray
    manifest: dict | None


def open_corpus(path: str | Path) -> Corpus:
    """Open a folder made by this command, or any Megatron dataset by its prefix (`my-corpus_text_sentence`)."""
    folder = Path(path)
    prefix = (
        folder / "corpus"
        if folder.is_dir()
        else folder.with_suffix("")
        if folder.suffix in (".bin", ".idx")
        else folder
    )
    manifest = folder / "manifest.json"
    return Corpus(*read_indexed_dataset(prefix), read_json(manifest) if manifest.is_file() else None)


class TokenisedDocument(NamedTuple):
    """A cleaned and split document: token_ids [T], lengths [S] of its sentences, and what the filters look at."""

    token_ids: np.ndarray
    lengths: np.ndarray
    num_characters: int
    fingerprint: bytes


def tokenise(document: Document, splitter: SentenceSplitter, tokenizer: Tokenizer) -> TokenisedDocument:
    """Clean, split into sentences and encode one document; sentences without a token are left out."""
    blocks = paragraphs(normalise(document.text), one_a_line=document.is_split)
    sentences = blocks if document.is_split else [sentence for block in blocks for sentence in splitter.split(block)]
    encoded = [ids for ids in map(tokenizer.encode, sentences) if ids]
    lengths = np.fromiter(map(len, encoded), np.int32, len(encoded))
    flat = np.fromiter(chain.from_iterable(encoded), token_type(tokenizer.vocab_size), int(lengths.sum()))
    return TokenisedDocument(flat, lengths, sum(map(len, blocks)), fingerprint(blocks))


def _tokenise_batch(batch: list[Document], splitter_path: Path, vocab_path: Path) -> list[TokenisedDocument]:
    splitter, tokenizer = _load_models(splitter_path, vocab_path)
    return [tokenise(document, splitter, tokenizer) for document in batch]


@lru_cache(maxsize=1)
def _load_models(splitter_path: Path, vocab_path: Path) -> tuple[SentenceSplitter, Tokenizer]:
    return load_splitter(splitter_path), load_tokenizer(vocab_path)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def ordered_map(function: Callable, items: Iterable, num_workers: int) -> Iterator:
    """`map` over processes, in the order of the items; at most two a worker wait, so that memory stays constant."""
    if num_workers == 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise OSError("a worker process was killed, probably for want of memory; try fewer --workers") from error
        finally:
            for future in waiting:
                future.cancel()


def _verdict(document: TokenisedDocument, seen: set[bytes], min_characters: int) -> str:
    """The name of the filter that drops a document, or "" to keep it; remembers its fingerprint."""
    if not len(document.lengths):
        return "empty"
    if document.num_characters < min_characters:
        return "shorter_than_min_characters"
    if document.fingerprint in seen:
        return "duplicate"
    seen.add(document.fingerprint)
    return ""


def _prepare_splitter(args: argparse.Namespace, files: list[Path], path: Path) -> None:
    """Train the sentence model on a sample and save it, unless an interrupted run has done so."""
    if path.exists():
        print(f"{path} is there: reused")
        return
    with tqdm(desc="sample", total=input_bytes(files), unit="B", unit_scale=True) as bar:
        documents = read_documents(files, args.format, args.text_key, lambda reason, place: None, bar.update)
        sample = sample_documents((d for d in documents if not d.is_split), int(args.punkt_mb * 1e6))
    num_bytes = sum(len(piece.text.encode()) for piece in sample)
    print(f"training the sentence splitter on {num_bytes / 1e6:.1f} MB")
    train_splitter(block for piece in sample for block in paragraphs(normalise(piece.text))).save(path)


def _write_corpus(args: argparse.Namespace, files: list[Path], tokenizer: Tokenizer, splitter_path: Path) -> dict:
    """Tokenise everything into corpus.bin and corpus.idx; returns the counts for the manifest."""
    skipped: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    seen: set[bytes] = set()
    work = partial(_tokenise_batch, splitter_path=splitter_path, vocab_path=tokenizer.path)
    writer = IndexedDatasetWriter(Path(args.output, "corpus"), token_type(tokenizer.vocab_size))
    try:
        with tqdm(desc="tokenise", total=input_bytes(files), unit="B", unit_scale=True) as bar:
            skip = count_skips(skipped, bar.write)
            documents = read_documents(files, args.format, args.text_key, skip, bar.update)
            for batch in ordered_map(work, _batches(documents), args.workers):
                for document in batch:
                    if reason := _verdict(document, seen, args.min_characters):
                        dropped[reason] += 1
                        continue
                    writer.add_document(document.token_ids, document.lengths)
                    counts["num_characters"] += document.num_characters
                    counts["num_unknown_tokens"] += int((document.token_ids == tokenizer.unk_id).sum())
        if not writer.num_documents:
            lost = dict(sorted((dropped + skipped).items()))
            raise ValueError(f"no document is left: {lost}; give other input or lower --min-characters")
        writer.finish()
    finally:
        writer.close()
    kept = {
        "num_documents": writer.num_documents,
        "num_sentences": writer.num_sequences,
        "num_tokens": writer.num_tokens,
    }
    return {**kept, **counts, "dropped": dict(sorted(dropped.items())), "skipped": dict(sorted(skipped.items()))}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.corpus",
        description="Clean documents, split them into sentences, tokenise them: a corpus in Megatron's .bin/.idx.",
    )
    add_input_arguments(parser)
    parser.add_argument(
        "--vocab", required=True, metavar="PATH", help="vocab.txt, a SentencePiece model, or a folder with one"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder for the corpus")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes; the output is the same for any (default: 1)"
    )
    parser.add_argument(
        "--min-characters", type=int, default=1, metavar="N", help="drop shorter documents (default: 1)"
    )
    parser.add_argument(
        "--punkt-mb",
        type=float,
        default=4.0,
        metavar="MB",
        help="text to train the sentence splitter on, at most 8 (default: 4)",
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers} must be at least 1")
    if not 0 < args.punkt_mb <= 8:
        raise ValueError(
            f"--punkt-mb {args.punkt_mb} must be more than 0 and at most 8; more text does not split better"
        )
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    files, input_settings = input_config(args)
    tokenizer = load_tokenizer(args.vocab)
    require_text(files, args.format, args.text_key)
    vocab = {
        "file": tokenizer.path.name,
        "sha256": tokenizer.sha256,
        "size": tokenizer.vocab_size,
        "kind": tokenizer.kind,
    }
    config = {"command": "data_prep.corpus", **input_settings, "vocab": vocab}
    config |= {"min_characters": args.min_characters, "punkt_mb": args.punkt_mb}
    output = Path(args.output)
    if claim_output(output, config) == "done":
        return
    vocab_path = tokenizer.save(output)
    splitter_path = output / "punkt.json"
    _prepare_splitter(args, files, splitter_path)
    counts = _write_corpus(args, files, tokenizer, splitter_path)
    checksums = {
        path.name: sha256_file(path)
        for path in (output / "corpus.bin", output / "corpus.idx", splitter_path, vocab_path)
    }
    manifest = {"format": "megatron-indexed-dataset", "config": config, "vocab": vocab, **counts, "sha256": checksums}
    write_json(output / "manifest.json", manifest)
    print(
        ", ".join(f"{counts[f'num_{what}']:,} {what}" for what in ("documents", "sentences", "tokens"))
        + f" in {output}"
    )


if __name__ == "__main__":
    run_cli(main)
