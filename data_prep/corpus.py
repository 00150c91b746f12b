"""Command line: documents -> Megatron's .bin and .idx, one sequence per sentence, with document bounds.

    python -m data_prep.corpus --input books/ --vocab vocab/ --output corpus/ --workers 4

Text is tokenised once, and shards of any sequence length are built from the result. The output folder holds

    corpus.bin corpus.idx    the tokens (see indexed_dataset.py)
    punkt.json               the sentence model, trained on a sample of the same input
    spm.model or vocab.txt   the vocabulary
    run.json                 the resolved options
    manifest.json            counts, what each filter dropped, and the sha256 of every file
    finished.json            written last

The work has three steps (see slices.py): prepare trains the sentence model; every slice tokenises its share of the
parts (see parts.py); finish removes duplicates in the order of the input and joins the parts. The output bytes do not
depend on the number of workers or slices. After an interruption the same command resumes and gives the same bytes.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_prep.cli import CaseOptions, InputOptions, at_least, number, option, parse, run_cli, share
from data_prep.files import read_json, remove_leftovers, sha256_file, write_json
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
from data_prep.slices import SliceOptions
from data_prep.text.cleaning import fingerprint, normalise, paragraphs
from data_prep.text.documents import (
    Document,
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
    first_occurrences,
    scrub,
    signature,
    verdict,
)
from data_prep.text.sentences import SentenceSplitter, load_splitter, train_splitter
from data_prep.text.tokenizer import Tokenizer, load_tokenizer
from data_prep.workers import worker_pool

FILTERS = "filters (manifest.json counts what they drop or replace)"


@dataclass(frozen=True, kw_only=True)
class CorpusOptions(InputOptions, CaseOptions, SliceOptions):
    """Clean documents, split them into sentences and tokenise them: a corpus in Megatron's .bin/.idx format.

    The output is the same for any number of workers and slices. After an interruption the same command resumes.
    With --prepare, --slice and --finish the work is spread over hosts that share the output folder.
    """

    vocab: Path = option("vocab.txt, a SentencePiece model, tokenizer.json, or a folder with one of them")
    output: Path = option("a new folder for the corpus", metavar="DIR")
    workers: int = option("number of processes", default=1, type=at_least(1))
    punkt_mb: float = option("MB of text to train the sentence model on", default=4.0, type=number(above=0, high=8))
    min_characters: int = option("smallest number of characters in a document", default=1, group=FILTERS)
    min_letters: float = option("smallest share of letters in a document", default=0.0, type=share, group=FILTERS)
    max_repeated: float = option("largest share of repeated text in a document", default=1.0, type=share, group=FILTERS)
    scrub: tuple[str, ...] = option(
        "replace these with [URL], [EMAIL], [PHONE]", default=(), choices=tuple(SCRUBBERS), group=FILTERS
    )
    near_duplicates: float | None = option(
        "drop documents that are at least this similar to an earlier one, by MinHash (0.8 is usual); the last step "
        "then takes some 6 kB of memory per document",
        default=None,
        type=number(low=0.5, below=1),
        group=FILTERS,
    )

    @property
    def filters(self) -> Filters:
        values = {name: getattr(self, name) for name in Filters._fields}
        return Filters(**values | {"scrub": tuple(sorted(set(self.scrub)))})


def main(argv: list[str] | None = None) -> None:
    options = parse(CorpusOptions, "data_prep.corpus", argv)
    files, input_settings = input_config(options)
    tokenizer = load_tokenizer(options.vocab, options.cased)
    require_text(files, options.format, options.text_key)
    filters, vocab, output = options.filters, tokenizer.describe(), options.output
    config = {**input_settings, "vocab": vocab, **filters._asdict(), "punkt_mb": options.punkt_mb}
    splitter, parts = output / "punkt.json", output / "parts"
    options.require_prepared(output, splitter)
    with options.claimed(output, "data_prep.corpus", config, parts) as steps:
        if steps.prepare:
            tokenizer.save(output)
            prepare(options, files, splitter)
        if steps.slice:
            tokenise_slice(options, files, Recipe(splitter, output / tokenizer.path.name, filters, parts), steps.slice)
        if steps.finish:
            counts = join_parts(finished_parts(parts, files), output, tokenizer, filters)
            names = ("corpus.bin", "corpus.idx", splitter.name, tokenizer.path.name)
            manifest = {"format": "megatron-indexed-dataset", "config": config, "vocab": vocab, **counts}
            manifest["sha256"] = {name: sha256_file(output / name) for name in names}
            write_json(output / "manifest.json", manifest)
            totals = ", ".join(f"{counts[f'num_{what}']:,} {what}" for what in ("documents", "sentences", "tokens"))
            print(f"{totals} in {output}")


class Corpus(NamedTuple):
    """A tokenised corpus: D documents with S sentences and T tokens.

    token_ids       uint16 or int32 [T], a memory map
    sentence_start  int64 [S + 1], in tokens
    document_start  int64 [D + 1], in sentences
    manifest        content of manifest.json; None for a corpus that another program made
    """

    token_ids: np.ndarray
    sentence_start: np.ndarray
    document_start: np.ndarray
    manifest: dict | None


def open_corpus(path: str | Path) -> Corpus:
    """Open a folder made by this command, or any Megatron dataset by its prefix (`my-corpus_text_sentence`)."""
    path = Path(path)
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    tokens = read_indexed_dataset(path / "corpus" if path.is_dir() else prefix)
    manifest = path / "manifest.json"
    content = read_json(manifest) if manifest.is_file() else None
    return Corpus(tokens.token_ids, tokens.sequence_start, tokens.document_start, content)


class Recipe(NamedTuple):
    """What a worker needs to make a part: the files of two models, the filters, and the folder of the parts."""

    splitter: Path
    vocab: Path
    filters: Filters
    parts: Path


@lru_cache(maxsize=1)
def _load_models(splitter: Path, vocab: Path) -> tuple[SentenceSplitter, Tokenizer]:
    return load_splitter(splitter), load_tokenizer(vocab)


def tokenise_part(recipe: Recipe, source: Source) -> None:
    """Tokenise the documents of one part and write it."""
    splitter, tokenizer = _load_models(recipe.splitter, recipe.vocab)
    part = tokenise(source.documents, splitter, tokenizer, recipe.filters)
    part.counts["skipped"] = dict(source.skipped)
    write_part(part_file(recipe.parts, source.volume, source.number), part)


def tokenise(documents: list[Document], splitter: SentenceSplitter, tokenizer: Tokenizer, filters: Filters) -> Part:
    """Clean, filter, split into sentences and encode documents. Sentences without a token are left out."""
    dropped, scrubbed = Counter(), Counter()
    sentences: list[list[int]] = []
    num_sentences, num_characters, fingerprints, signatures = [], [], [], []
    for document in documents:
        blocks = paragraphs(normalise(document.text), one_a_line=document.is_split)
        blocks = scrub(blocks, filters.scrub, scrubbed)
        lines = blocks if document.is_split else chain.from_iterable(map(splitter.split, blocks))
        encoded = [ids for ids in map(tokenizer.encode, lines) if ids]
        if reason := verdict(blocks, filters) if encoded else "empty":
            dropped[reason] += 1
            continue
        sentences += encoded
        num_sentences.append(len(encoded))
        num_characters.append(sum(map(len, blocks)))
        fingerprints.append(np.frombuffer(fingerprint(blocks), np.uint64))
        signatures.append(signature(blocks) if filters.near_duplicates else ())
    lengths = np.fromiter(map(len, sentences), np.int32, len(sentences))
    num_hashes = NUM_PERMUTATIONS if filters.near_duplicates else 0
    return Part(
        token_ids=np.fromiter(chain.from_iterable(sentences), token_type(tokenizer.vocab_size), int(lengths.sum())),
        lengths=lengths,
        num_sentences=np.array(num_sentences, np.int32),
        num_characters=np.array(num_characters, np.int32),
        fingerprints=np.array(fingerprints, np.uint64).reshape(-1, 2),
        signatures=np.array(signatures, np.uint32).reshape(len(signatures), num_hashes),
        counts={"dropped": dict(dropped), "scrubbed": dict(scrubbed)},
    )


def prepare(options: CorpusOptions, files: list[Path], path: Path) -> None:
    """Train the sentence model on a sample and save it, unless an interrupted run already has."""
    if path.exists():
        print(f"{path} exists: reused")
        return
    with tqdm(desc="sample", total=input_bytes(files), unit="B", unit_scale=True) as bar:
        documents = read_documents(files, options.format, options.text_key, lambda reason, place: None, bar.update)
        sample = sample_documents((d for d in documents if not d.is_split), int(options.punkt_mb * 1e6))
    num_bytes = sum(len(piece.text.encode()) for piece in sample)
    print(f"training the sentence splitter on {num_bytes / 1e6:.1f} MB")
    train_splitter(block for piece in sample for block in paragraphs(normalise(piece.text))).save(path)


def tokenise_slice(options: CorpusOptions, files: list[Path], recipe: Recipe, slice: tuple[int, int]) -> None:
    """Make all parts of slice (I, N) that do not exist yet."""
    recipe.parts.mkdir(exist_ok=True)
    bar = tqdm(desc="tokenise", total=input_bytes(files), unit="B", unit_scale=True)
    with bar, worker_pool(options.workers) as ordered_map:
        sources = missing_sources(recipe.parts, files, options, slice, bar)
        for _ in ordered_map(partial(tokenise_part, recipe), sources):
            pass


def join_parts(paths: list[Path], output: Path, tokenizer: Tokenizer, filters: Filters) -> dict:
    """Join the parts into corpus.bin and corpus.idx without duplicates. Returns the counts for the manifest."""
    remove_leftovers(output)
    fingerprints, counts = overview(paths)
    dropped = counts.setdefault("dropped", Counter())
    num_characters = num_unknown_tokens = 0
    writer = IndexedDatasetWriter(output / "corpus", token_type(tokenizer.vocab_size))
    try:
        parts = _without_duplicates(paths, fingerprints, filters, dropped)
        for part, keep in tqdm(parts, "join", len(paths), unit="part"):
            token_ids, lengths, num_sentences = kept_of(part, keep)
            writer.add_documents(token_ids, lengths, num_sentences)
            num_characters += int(part.num_characters[keep].sum())
            num_unknown_tokens += int((token_ids == tokenizer.unk_id).sum())
        if not writer.num_documents:
            lost = dict(sorted((dropped + counts.get("skipped", Counter())).items()))
            raise ValueError(f"no document is left: {lost}; give other input or lower --min-characters")
        writer.finish()
    finally:
        writer.close()
    return {
        "num_documents": writer.num_documents,
        "num_sentences": writer.num_sequences,
        "num_tokens": writer.num_tokens,
        **{kind: dict(sorted(count.items())) for kind, count in counts.items()},
        "num_characters": num_characters,
        "num_unknown_tokens": num_unknown_tokens,
    }


def _without_duplicates(
    paths: list[Path], fingerprints: np.ndarray, filters: Filters, dropped: Counter[str]
) -> Iterator[tuple[Part, np.ndarray]]:
    """Each part, with bool [D] for the documents to keep: of several duplicates, the first is kept."""
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


if __name__ == "__main__":
    run_cli(main)
