"""Command line: a tokenised corpus -> masked shards, the same bytes for any number of workers.

    python -m data_prep.build --corpus corpus/ --output shards/ --seq-length 128 --workers 4

    prepare  counts the instances of each chunk of documents, in order to number all instances; workers write each
             chunk's instances in shuffled order                                -> OUTPUT/chunks/chunk-*.npy
    slice    workers collect a shard's share of every chunk, copy and mask it   -> OUTPUT/shard-*.safetensors
    finish   writes manifest.json and removes the chunks

Chunks have a fixed size and the shuffle is a formula (`randomness.permuted`), so the result does not depend on which
process does a step. A process holds one chunk or one shard in memory, and the bounds of the corpus (8 bytes per
sentence). After an interruption the same command resumes and keeps finished files. Slice I of N writes every N-th
shard (see slices.py).
"""

import sys
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_prep.cli import CaseOptions, at_least, between, number, option, parse, run_cli, share
from data_prep.corpus import Corpus, open_corpus
from data_prep.files import finished_file, read_json, remove_leftovers, write_json
from data_prep.instances import (
    PAIR_TASKS,
    InstanceRule,
    assemble,
    check_size,
    count_instances,
    doubt_about_sentences,
    drop_empty,
    make_instances,
    total,
)
from data_prep.masking import MaskingRule, mask_sequences, masking_rule
from data_prep.randomness import shuffled_positions
from data_prep.shards import MANIFEST, join_records, make_manifest, shard_entry, write_shard
from data_prep.slices import SliceOptions, require_made
from data_prep.text.tokenizer import Tokenizer, load_tokenizer
from data_prep.workers import worker_pool

CHUNK_TOKENS = 1 << 22  # some 40,000 instances of 128 tokens
SHARD_TOKENS = 1 << 24  # 32 MB of tokens per shard, unless --num-shards says otherwise
MIN_SHARDS = 8  # so that even a small corpus keeps several workers and readers busy
BLOCK_SEQUENCES = 4096  # few enough to stay in the processor's cache between assembly and masking


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """The options that, with corpus and vocabulary, determine the shards. The manifest records them."""

    seq_length: int = option("tokens per sequence, special ones included", default=128, type=between(8, (1 << 16) - 1))
    max_predictions: int = option(
        "maximum number of masked tokens per sequence; 20 is usual for 128 and 80 for 512", default=20, type=at_least(1)
    )
    duplicates: int = option("passes over the corpus, each with different pairs and masks", default=5, type=at_least(1))
    pair_task: str = option("next sentence, sentence order or none", default="nsp", choices=tuple(PAIR_TASKS))
    masked_lm_prob: float = option("share of the tokens that are masked", default=0.15, type=number(above=0, below=1))
    whole_word: bool = option("mask all pieces of a word together", default=False)
    max_ngram: int = option("mask runs of up to this many tokens or whole words", default=1, type=between(1, 10))
    short_seq_prob: float = option("share of the documents cut into shorter sequences", default=0.1, type=share)
    seed: int = option("determines pairs, masks and order", default=0, type=between(0, (1 << 63) - 1))

    def __post_init__(self) -> None:
        if self.max_predictions >= self.seq_length:
            raise ValueError(f"--max-predictions {self.max_predictions} is not below --seq-length {self.seq_length}")


@dataclass(frozen=True, kw_only=True)
class BuildOptions(BuildConfig, CaseOptions, SliceOptions):
    """Make masked training sequences from a tokenised corpus: sentence pairs, masks, shuffled shards.

    The output is the same for any number of workers and slices. After an interruption the same command resumes.

    example: python -m data_prep.build --corpus runs/corpus --output runs/shards --seq-length 128
    """

    corpus: Path = option("a folder made by data_prep.corpus, or a Megatron prefix (.bin/.idx)")
    output: Path = option("a new folder for the shards", metavar="DIR")
    vocab: Path | None = option(
        "the vocabulary, for a corpus made by another program; our own contain it", default=None
    )
    num_shards: int | None = option(
        "number of files; by default one per 32 MB of tokens, but at least 8", default=None, type=at_least(1)
    )
    workers: int = option("number of processes", default=1, type=at_least(1))

    @property
    def config(self) -> dict:
        """The fields of BuildConfig by name."""
        return {field.name: getattr(self, field.name) for field in fields(BuildConfig)}


class BuildTask(NamedTuple):
    """What a worker needs to know, for any chunk or shard.

    token_file, token_dtype  the tokens of the corpus
    output                   folder of the shards and of chunks/
    rule, masking            how documents become instances, and instances become masked sequences
    shard_dtype              dtype of the shards' tokens
    chunk_start              int64 [chunks + 1], number of each chunk's first instance; ends with their total number
    shard_start              int64 [shards + 1], position of each shard's first sequence
    """

    token_file: Path
    token_dtype: np.dtype
    output: Path
    rule: InstanceRule
    masking: MaskingRule
    cls_id: int
    sep_id: int
    shard_dtype: np.dtype
    chunk_start: np.ndarray
    shard_start: np.ndarray

    @property
    def num_sequences(self) -> int:
        return int(self.chunk_start[-1])

    def shard_size(self, shard: int) -> int:
        return int(self.shard_start[shard + 1] - self.shard_start[shard])

    def chunk_file(self, chunk: int) -> Path:
        return self.output / "chunks" / f"chunk-{chunk:05d}.npy"

    def shard_file(self, shard: int) -> Path:
        return self.output / f"shard-{shard:05d}-of-{len(self.shard_start) - 1:05d}.safetensors"


def main(argv: list[str] | None = None) -> None:
    options = parse(BuildOptions, "data_prep.build", argv)
    build(open_corpus(options.corpus), load_tokenizer(options.vocab or options.corpus, options.cased), options)


def build(corpus: Corpus, tokenizer: Tokenizer, options: BuildOptions) -> None:
    """Write the shard folder `options.output`, or do one of its steps. Raises ValueError before anything is written."""
    rule = InstanceRule(**{name: getattr(options, name) for name in InstanceRule._fields})
    check_vocabulary(corpus, tokenizer)
    sentence_start, document_start = drop_empty(corpus.sentence_start, corpus.document_start)
    check_size(np.diff(document_start), rule.pair_task)
    chunks = cut_into_chunks(sentence_start, document_start, rule.duplicates)
    folder = options.output / "chunks"
    prepared = folder / "prepared.json"
    options.require_prepared(options.output, prepared)
    with worker_pool(options.workers) as ordered_map:  # its processes start while this one counts
        if prepared.exists():
            counts = read_json(prepared)
        else:
            bar = tqdm(chunks, "count", unit="chunk")
            counts = [count_instances(sentence_start, document_start, chunk, rule) for chunk in bar]
        num_shards = options.num_shards or default_num_shards(sum(counts), rule.seq_length)
        if num_shards > sum(counts):
            raise ValueError(
                f"--num-shards {num_shards} exceeds the {sum(counts)} sequences of this corpus; choose fewer"
            )
        origin = {"vocab": _describe_vocab(tokenizer), "corpus": _describe_corpus(corpus)}
        identity = options.config | {"num_shards": num_shards} | origin
        task = _make_task(corpus, tokenizer, options, rule, counts, num_shards)
        with options.claimed(options.output, "data_prep.build", identity, folder) as steps:
            if steps.prepare and not prepared.exists():
                folder.mkdir(exist_ok=True)
                _save(folder / "sentences.npy", sentence_start)
                _save(folder / "documents.npy", document_start)
                totals = ordered_map(partial(write_chunk, task), enumerate(chunks))
                totals = sum(tqdm(totals, "chunks", len(chunks), unit="chunk"))
                if doubt := doubt_about_sentences(totals, sentence_start, document_start, rule):
                    print(f"warning: {doubt}", file=sys.stderr)
                tokenizer.save(options.output)
                write_json(prepared, counts)
            if steps.slice:
                index, count = steps.slice
                _write_shards(task, range(index, num_shards, count), ordered_map)
            if steps.finish:
                files = [task.shard_file(shard) for shard in range(num_shards)]
                require_made(options.output, files, "shards")
                entries = list(tqdm(ordered_map(shard_entry, files), "checksum", len(files), unit="shard"))
                remove_leftovers(options.output)
                write_json(options.output / MANIFEST, make_manifest(options.config, **origin, shards=entries))


def _make_task(
    corpus: Corpus, tokenizer: Tokenizer, options: BuildOptions, rule: InstanceRule, counts: list[int], num_shards: int
) -> BuildTask:
    names = ("masked_lm_prob", "max_predictions", "whole_word", "max_ngram")
    return BuildTask(
        token_file=Path(corpus.token_ids.filename),
        token_dtype=corpus.token_ids.dtype,
        output=options.output,
        rule=rule,
        masking=masking_rule(tokenizer, **{name: getattr(options, name) for name in names}),
        cls_id=tokenizer.cls_id,
        sep_id=tokenizer.sep_id,
        shard_dtype=np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32),
        chunk_start=np.concatenate([[0], np.cumsum(counts)]),
        shard_start=np.arange(num_shards + 1) * sum(counts) // num_shards,
    )


def _write_shards(task: BuildTask, shards: range, ordered_map: Callable) -> None:
    with tqdm(desc="write", total=sum(map(task.shard_size, shards)), unit="seq", unit_scale=True) as bar:
        for num_sequences in ordered_map(partial(fill_shard, task), shards):
            bar.update(num_sequences)


def cut_into_chunks(sentence_start: np.ndarray, document_start: np.ndarray, duplicates: int) -> list[range]:
    """Ranges of whole documents with about CHUNK_TOKENS tokens each, duplicates included."""
    token_of_document = sentence_start[document_start]
    chunk_of_document = token_of_document[:-1] // max(1, CHUNK_TOKENS // duplicates)
    starts = np.flatnonzero(np.diff(chunk_of_document, prepend=-1))
    stops = np.append(starts[1:], len(chunk_of_document))
    return [range(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True)]


def default_num_shards(num_sequences: int, seq_length: int) -> int:
    return min(num_sequences, max(MIN_SHARDS, -(-num_sequences * seq_length // SHARD_TOKENS)))


def write_chunk(task: BuildTask, numbered_chunk: tuple[int, range]) -> np.ndarray:
    """Write the instances of a chunk (number, documents), sorted by shuffled position. Returns their `total`."""
    chunk, documents = numbered_chunk
    path = task.chunk_file(chunk)
    if path.exists():
        return total(np.load(path, mmap_mode="r"))
    sentence_start = np.load(path.with_name("sentences.npy"), mmap_mode="r")
    document_start = np.load(path.with_name("documents.npy"), mmap_mode="r")
    first, last = task.chunk_start[chunk : chunk + 2]
    instances = make_instances(sentence_start, document_start, documents, task.rule, last - first)
    instances["position"] = shuffled_positions(first, last, task.num_sequences, task.rule.seed)
    _save(path, instances[np.argsort(instances["position"])])
    return total(instances)


def fill_shard(task: BuildTask, shard: int) -> int:
    """Write one shard, unless it exists, and return the number of its sequences."""
    path = task.shard_file(shard)
    if path.exists():
        return task.shard_size(shard)
    instances = _instances_of_shard(task, shard)
    token_ids = np.memmap(task.token_file, task.token_dtype, mode="r")
    blocks = []
    for first in range(0, len(instances), BLOCK_SEQUENCES):
        block = instances[first : first + BLOCK_SEQUENCES]
        records = assemble(token_ids, block, cls_id=task.cls_id, sep_id=task.sep_id, dtype=task.shard_dtype)
        blocks.append(mask_sequences(records, block["position"], task.masking, seed=task.rule.seed))
    write_shard(path, join_records(blocks))
    return task.shard_size(shard)


def _instances_of_shard(task: BuildTask, shard: int) -> np.ndarray:
    first, last = task.shard_start[shard : shard + 2]
    slices = []
    for chunk in range(len(task.chunk_start) - 1):
        instances = np.load(task.chunk_file(chunk), mmap_mode="r")
        positions = instances["position"]
        # bisect reads a few pages of the file; searchsorted would copy the whole column.
        slices.append(instances[bisect_left(positions, first) : bisect_left(positions, last)])
    instances = np.concatenate(slices)
    return instances[np.argsort(instances["position"])]


def check_vocabulary(corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Raise ValueError if the corpus was evidently made with another vocabulary."""
    if corpus.manifest is not None:
        theirs, ours = corpus.manifest["vocab"], tokenizer.describe()
        for key in ("sha256", "lower_case", "strip_accents"):
            if theirs.get(key, ours[key]) != ours[key]:
                raise ValueError(
                    f"vocabulary {tokenizer.path} ({key} {ours[key]}) is not the one the corpus was tokenised with "
                    f"({theirs[key]}); give that one or tokenise again with `python -m data_prep.corpus`"
                )
    elif (largest := int(corpus.token_ids.max(initial=0))) >= tokenizer.vocab_size:
        raise ValueError(
            f"the corpus holds token id {largest} and vocabulary {tokenizer.path} has {tokenizer.vocab_size} entries; "
            "give the vocabulary it was tokenised with as --vocab"
        )


def _describe_vocab(tokenizer: Tokenizer) -> dict:
    names = ("pad_id", "unk_id", "cls_id", "sep_id", "mask_id")
    return tokenizer.describe() | {name: getattr(tokenizer, name) for name in names}


def _describe_corpus(corpus: Corpus) -> dict:
    return {
        "num_documents": len(corpus.document_start) - 1,
        "num_sentences": len(corpus.sentence_start) - 1,
        "num_tokens": len(corpus.token_ids),
        "sha256": corpus.manifest.get("sha256") if corpus.manifest else None,
    }


def _save(path: Path, array: np.ndarray) -> None:
    with finished_file(path) as file:
        np.save(file, array)


if __name__ == "__main__":
    run_cli(main)
