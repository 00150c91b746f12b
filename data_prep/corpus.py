"""Command line: documents -> Megatron's .bin and .idx, one sequence a sentence, with document bounds.

    python -m data_prep.corpus --input books/ --vocab vocab/ --output corpus/ --workers 4

Tokenising is done once; shards of any sequence length are built from it. DIR then holds

    corpus.bin corpus.idx    the tokens (see indexed_dataset.py)
    punkt.json               the sentence model, trained on a sample of the same input
    spm.model or vocab.txt   the vocabulary
    run.json                 the resolved options
    manifest.json            counts, what each filter dropped, and the sha256 of every file

Three steps: prepare (the sentence model, from a sample of everything), tokenise part by part (see parts.py), finish
(one process decides on duplicates in the order of the input and joins the parts). The bytes depend neither on the
number of workers nor on that of slices, nor on how often a process was killed: the same command goes on.
"""

import argparse
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_prep.cli import add_slice_arguments, run_cli
from data_prep.files import (
    claim_output,
    mark_finished,
    read_json,
    remove_leftovers,
    sha256_file,
    sole_process,
    write_json,
)
from data_prep.indexed_dataset import IndexedDatasetWriter, read_indexed_dataset, token_type
from data_prep.parts import (
    Part,
    Source,
    finished_parts,
    kept_of,
    missing_sources,
    overview,
    part_file,
    read_part,
    write_part,
)
from data_prep.text.cleaning import fingerprint, normalise, paragraphs
from data_prep.text.documents import (
    Document,
    add_input_arguments,
    input_bytes,
    input_config,
    read_documents,
    require_text,
    sample_documents,
)
from data_prep.text.filters import (
    NUM_PERMUTATIONS,
    SCRUBBERS,
    Filters,
    NearDuplicates,
    check_filters,
    first_occurrences,
    scrub,
    signature,
    verdict,
)
from data_prep.text.sentences import SentenceSplitter, load_splitter, train_splitter
from data_prep.text.tokenizer import Tokenizer, add_case_arguments, load_tokenizer
from data_prep.workers import worker_pool


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


class Recipe(NamedTuple):
    """What a worker needs to turn text into parts."""

    splitter: Path
    vocab: Path
    filters: Filters
    parts: Path


@lru_cache(maxsize=1)
def _load_models(splitter: Path, vocab: Path) -> tuple[SentenceSplitter, Tokenizer]:
    return load_splitter(splitter), load_tokenizer(vocab)


def tokenise_part(recipe: Recipe, source: Source) -> int:
    """Tokenise the documents of a part and write it; returns their number. This is what workers do."""
    splitter, tokenizer = _load_models(recipe.splitter, recipe.vocab)
    part = tokenise(source.documents, splitter, tokenizer, recipe.filters)
    part.counts["skipped"] = dict(source.skipped)
    write_part(part_file(recipe.parts, source.volume, source.number), part)
    return len(source.documents)


def tokenise(documents: list[Document], splitter: SentenceSplitter, tokenizer: Tokenizer, filters: Filters) -> Part:
    """Clean, filter, split into sentences and encode documents; sentences without a token are left out."""
    dropped: Counter[str] = Counter()
    scrubbed: Counter[str] = Counter()
    sentences: list[list[int]] = []
    rows = []
    for document in documents:
        blocks = paragraphs(normalise(document.text), one_a_line=document.is_split)
        blocks = scrub(blocks, filters.scrub, scrubbed)
        if document.is_split:
            encoded = [ids for ids in map(tokenizer.encode, blocks) if ids]
        else:
            encoded = [ids for block in blocks for ids in map(tokenizer.encode, splitter.split(block)) if ids]
        if reason := verdict(blocks, filters) if encoded else "empty":
            dropped[reason] += 1
            continue
        sentences += encoded
        sketch = signature(blocks) if filters.near_duplicates else ()
        rows.append((len(encoded), sum(map(len, blocks)), np.frombuffer(fingerprint(blocks), np.uint64), sketch))
    lengths = np.fromiter(map(len, sentences), np.int32, len(sentences))
    num_hashes = NUM_PERMUTATIONS if filters.near_duplicates else 0
    return Part(
        token_ids=np.fromiter(chain.from_iterable(sentences), token_type(tokenizer.vocab_size), int(lengths.sum())),
        lengths=lengths,
        num_sentences=np.array([row[0] for row in rows], np.int32),
        num_characters=np.array([row[1] for row in rows], np.int32),
        fingerprints=np.array([row[2] for row in rows], np.uint64).reshape(len(rows), 2),
        signatures=np.array([row[3] for row in rows], np.uint32).reshape(len(rows), num_hashes),
        counts={"dropped": dict(dropped), "scrubbed": dict(scrubbed)},
    )


def prepare(args: argparse.Namespace, files: list[Path], path: Path) -> None:
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


def tokenise_slice(args: argparse.Namespace, files: list[Path], recipe: Recipe) -> None:
    """Make all parts of the slice (of everything, without --slice) that are not there yet."""
    recipe.parts.mkdir(exist_ok=True)
    slice = args.slice or (0, 1)
    bar = tqdm(desc="tokenise", total=input_bytes(files), unit="B", unit_scale=True)
    with bar, worker_pool(args.workers) as ordered_map:
        sources = missing_sources(recipe.parts, files, args.format, args.text_key, slice, bar.write, bar.update)
        for _ in ordered_map(partial(tokenise_part, recipe), sources):
            pass


def finish(output: Path, files: list[Path], tokenizer: Tokenizer, filters: Filters) -> dict:
    """Join the parts into corpus.bin and corpus.idx without duplicates; returns the counts for the manifest."""
    paths = finished_parts(output / "parts", files)
    remove_leftovers(output)
    fingerprints, counts = overview(paths)
    dropped = counts.setdefault("dropped", Counter())
    counts["num_characters"] = counts["num_unknown_tokens"] = 0
    writer = IndexedDatasetWriter(output / "corpus", token_type(tokenizer.vocab_size))
    try:
        for part, keep in tqdm(
            _without_duplicates(paths, fingerprints, filters, dropped), "join", len(paths), unit="part"
        ):
            token_ids, lengths, num_sentences = kept_of(part, keep)
            writer.add_documents(token_ids, lengths, num_sentences)
            counts["num_characters"] += int(part.num_characters[keep].sum())
            counts["num_unknown_tokens"] += int((token_ids == tokenizer.unk_id).sum())
        if not writer.num_documents:
            lost = dict(sorted((dropped + counts.get("skipped", Counter())).items()))
            raise ValueError(f"no document is left: {lost}; give other input or lower --min-characters")
        writer.finish()
    finally:
        writer.close()
    kept = {
        "num_documents": writer.num_documents,
        "num_sentences": writer.num_sequences,
        "num_tokens": writer.num_tokens,
    }
    return kept | {
        name: dict(sorted(value.items())) if isinstance(value, Counter) else value for name, value in counts.items()
    }


def _without_duplicates(
    paths: list[Path], fingerprints: np.ndarray, filters: Filters, dropped: Counter[str]
) -> Iterator[tuple[Part, np.ndarray]]:
    """Each part with bool [D]: the documents to keep. The first of several duplicates stays."""
    is_first = first_occurrences(fingerprints)
    index = NearDuplicates(filters.near_duplicates) if filters.near_duplicates else None
    start = 0
    for path in paths:
        part = read_part(path)
        keep = is_first[start : start + len(part.num_sentences)].copy()
        start += len(keep)
        dropped["duplicate"] += int((~keep).sum())
        for document in np.flatnonzero(keep) if index else ():
            if not index.is_new(part.signatures[document]):
                keep[document] = False
                dropped["near_duplicate"] += 1
        yield part, keep


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.corpus",
        description="Clean documents, split them into sentences, tokenise them: a corpus in Megatron's .bin/.idx.",
    )
    add_input_arguments(parser)
    parser.add_argument(
        "--vocab",
        required=True,
        metavar="PATH",
        help="vocab.txt, a SentencePiece model, tokenizer.json, or a folder with one",
    )
    add_case_arguments(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder for the corpus")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes; the output is the same for any (default: 1)"
    )
    parser.add_argument(
        "--punkt-mb",
        type=float,
        default=4.0,
        metavar="MB",
        help="text to train the sentence splitter on, at most 8 (default: 4)",
    )
    default = Filters()
    add = parser.add_argument_group("filters", "what each one drops is counted in manifest.json").add_argument
    add("--min-characters", type=int, default=1, metavar="N", help="drop shorter documents (default: 1)")
    add("--min-letters", type=float, default=0.0, metavar="SHARE", help="drop those with a smaller share of letters")
    add("--max-repeated", type=float, default=1.0, metavar="SHARE", help="drop those that repeat more of their text")
    add("--scrub", nargs="+", action="extend", choices=SCRUBBERS, default=[], help="replace by [URL], [EMAIL], [PHONE]")
    add(
        "--near-duplicates",
        type=float,
        default=default.near_duplicates,
        metavar="SIMILARITY",
        help="drop documents as similar as that to an earlier one, by MinHash (try 0.8); takes some 6 kB of memory a "
        "document in the last step",
    )
    add_slice_arguments(parser, "the sentence model")
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
    filters = Filters(
        args.min_characters, args.min_letters, args.max_repeated, tuple(sorted(set(args.scrub))), args.near_duplicates
    )
    check_filters(filters)
    files, input_settings = input_config(args)
    tokenizer = load_tokenizer(args.vocab, args.cased)
    require_text(files, args.format, args.text_key)
    vocab = tokenizer.describe()
    config = {**input_settings, "vocab": vocab}
    config |= {**filters._asdict(), "punkt_mb": args.punkt_mb}
    output = Path(args.output)
    splitter = output / "punkt.json"
    if (args.slice or args.finish) and not splitter.exists():
        raise ValueError(f"{output} is not prepared: give the same command with --prepare first, once")
    with sole_process(output, shared=args.slice is not None):
        if claim_output(output, "data_prep.corpus", config) == "done":
            shutil.rmtree(output / "parts", ignore_errors=True)  # killed between its last two acts
            return
        all_steps = not (args.prepare or args.slice or args.finish)
        if args.prepare or all_steps:
            tokenizer.save(output)
            prepare(args, files, splitter)
        if args.slice or all_steps:
            tokenise_slice(args, files, Recipe(splitter, output / tokenizer.path.name, filters, output / "parts"))
        if args.finish or all_steps:
            counts = finish(output, files, tokenizer, filters)
            names = ("corpus.bin", "corpus.idx", splitter.name, tokenizer.path.name)
            sha256 = {name: sha256_file(output / name) for name in names}
            manifest = {"format": "megatron-indexed-dataset", "config": config, "vocab": vocab}
            write_json(output / "manifest.json", manifest | counts | {"sha256": sha256})
            mark_finished(output)
            shutil.rmtree(output / "parts")
            totals = ", ".join(f"{counts[f'num_{what}']:,} {what}" for what in ("documents", "sentences", "tokens"))
            print(f"{totals} in {output}")


if __name__ == "__main__":
    run_cli(main)
