"""CLI: a tokenised corpus to masked shards, the same bytes for any number of workers.

    prepare  how many instances each chunk of documents gives, so that each knows where its numbers begin;
             workers write each chunk's instances in shuffled order             -> OUTPUT/plan/chunk-*.npy
    write    workers collect a shard's share of every chunk, copy and mask it   -> OUTPUT/shard-*.safetensors
    finish   the plan is removed, manifest.json is written

Chunks have a fixed size and the shuffle is a formula (`randomness.permuted`), so no step depends on who does it, and
none holds more than a chunk or a shard in memory; the corpus' bounds take 8 bytes a sentence. A finished file is never
made twice: the same command goes on after an interruption. Slice I of N writes every N-th shard.
"""

import argparse
import shutil
import sys
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_prep.cli import add_slice_arguments, run_cli
from data_prep.corpus import Corpus, open_corpus
from data_prep.files import (
    FINISHED_FILE,
    claim_output,
    finished_file,
    mark_finished,
    read_json,
    remove_leftovers,
    sole_process,
    write_json,
)
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
from data_prep.shards import MANIFEST, Records, join_records, make_manifest, shard_entry, write_shard
from data_prep.text.tokenizer import Tokenizer, add_case_arguments, load_tokenizer
from data_prep.workers import worker_pool

CHUNK_TOKENS = 1 << 22  # a unit of planning: some 40,000 instances of 128 tokens
SHARD_TOKENS = 1 << 24  # 32 MB of tokens in a shard, unless --num-shards says otherwise
MIN_SHARDS = 8  # so that a small corpus, too, keeps several workers and readers busy
BLOCK_SEQUENCES = 4096  # assembled and masked while they are in the processor's cache


@dataclass(frozen=True)
class BuildConfig:
    """What determines the shards, besides corpus and vocabulary; it goes into their manifest."""

    seq_length: int = 128
    max_predictions: int = 20
    duplicates: int = 5
    pair_task: str = "nsp"
    masked_lm_prob: float = 0.15
    whole_word: bool = False
    max_ngram: int = 1
    short_seq_prob: float = 0.1
    seed: int = 0

    @property
    def instance_rule(self) -> InstanceRule:
        return InstanceRule(self.seq_length, self.pair_task, self.duplicates, self.short_seq_prob, self.seed)


class Job(NamedTuple):
    """What a worker is told: small, and the same for every unit of work.

    token_file, token_dtype  the corpus' tokens
    output                   folder of the shards and of plan/
    shard_dtype              of the shards' tokens
    chunk_start              int64 [chunks + 1], number of the chunk's first instance; the last is their total N
    shard_start              int64 [shards + 1], position of the shard's first sequence
    """

    token_file: Path
    token_dtype: np.dtype
    output: Path
    config: BuildConfig
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
        return self.output / "plan" / f"chunk-{chunk:05d}.npy"

    def shard_file(self, shard: int) -> Path:
        return self.output / f"shard-{shard:05d}-of-{len(self.shard_start) - 1:05d}.safetensors"


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    config = BuildConfig(**{name: getattr(args, name) for name in BuildConfig.__dataclass_fields__})
    check_config(config)
    corpus = open_corpus(args.corpus)
    tokenizer = load_tokenizer(args.vocab or args.corpus, args.cased)
    steps = {"prepare": args.prepare, "slice": args.slice, "finish": args.finish}
    build(corpus, tokenizer, args.output, config, num_shards=args.num_shards, workers=args.workers, **steps)


def build(
    corpus: Corpus,
    tokenizer: Tokenizer,
    output: str | Path,
    config: BuildConfig,
    *,
    num_shards: int | None = None,
    workers: int = 1,
    prepare: bool = False,
    slice: tuple[int, int] | None = None,
    finish: bool = False,
) -> None:
    """Write the shard folder `output` (see data_prep.shards), or do one step of it: prepare, slice (I, N) or finish.

    Raises ValueError before anything is written.
    """
    output = Path(output)
    check_config(config)
    for name, number in (("num_shards", num_shards), ("workers", workers)):
        if number is not None and number < 1:
            raise ValueError(f"{name}={number} must be at least 1")
    check_vocabulary(corpus, tokenizer)
    bounds = drop_empty(corpus.sentence_start, corpus.document_start)
    check_size(np.diff(bounds[1]), config.pair_task)
    chunks = cut_into_chunks(*bounds, config.duplicates)
    prepared = output / "plan" / "prepared.json"
    if (slice or finish) and not (prepared.exists() or (output / FINISHED_FILE).exists()):
        raise ValueError(f"{output} is not prepared: give the same command with --prepare first, once")
    with worker_pool(workers) as ordered_map:  # its processes start while this one counts
        counts = read_json(prepared) if prepared.exists() else _count(*bounds, chunks, config.instance_rule)
        num_shards = num_shards or default_num_shards(sum(counts), config.seq_length)
        if num_shards > sum(counts):
            raise ValueError(
                f"num_shards={num_shards} exceeds the {sum(counts)} sequences of this corpus; choose at most that many"
            )
        identity = {"vocab": _describe_vocab(tokenizer), "corpus": _describe_corpus(corpus)}
        with sole_process(output, shared=slice is not None):
            claim = asdict(config) | {"num_shards": num_shards} | identity
            if claim_output(output, "data_prep.build", claim) == "done":
                shutil.rmtree(output / "plan", ignore_errors=True)  # killed between its last two acts
                return
            job = _make_job(corpus, tokenizer, output, config, counts, num_shards)
            all_steps = not (prepare or slice or finish)
            if (prepare or all_steps) and not prepared.exists():
                _share_bounds(output / "plan", *bounds)
                plan = ordered_map(partial(plan_chunk, job), enumerate(chunks))
                totals = sum(tqdm(plan, "plan", len(chunks), unit="chunk"))
                if doubt := doubt_about_sentences(totals, *bounds, config.instance_rule):
                    print(f"warning: {doubt}", file=sys.stderr)
                tokenizer.save(output)
                write_json(prepared, counts)
            if slice or all_steps:
                index, count = slice or (0, 1)
                _write_shards(job, range(index, num_shards, count), ordered_map)
            if finish or all_steps:
                entries = _finished_entries(job, ordered_map)
                remove_leftovers(output)
                write_json(output / MANIFEST, make_manifest(asdict(config), **identity, shards=entries))
                mark_finished(output)
                shutil.rmtree(output / "plan")


def _count(sentence_start, document_start, chunks: list[range], rule: InstanceRule) -> list[int]:
    bar = tqdm(chunks, "count", unit="chunk")
    return [count_instances(sentence_start, document_start, chunk, rule) for chunk in bar]


def _make_job(
    corpus: Corpus, tokenizer: Tokenizer, output: Path, config: BuildConfig, counts: list[int], num_shards: int
) -> Job:
    names = ("masked_lm_prob", "max_predictions", "whole_word", "max_ngram")
    return Job(
        token_file=Path(corpus.token_ids.filename),
        token_dtype=corpus.token_ids.dtype,
        output=output,
        config=config,
        masking=masking_rule(tokenizer, **{name: getattr(config, name) for name in names}),
        cls_id=tokenizer.cls_id,
        sep_id=tokenizer.sep_id,
        shard_dtype=np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32),
        chunk_start=np.concatenate([[0], np.cumsum(counts)]),
        shard_start=np.arange(num_shards + 1) * sum(counts) // num_shards,
    )


def _write_shards(job: Job, shards: range, ordered_map: Callable) -> None:
    with tqdm(desc="write", total=int(sum(map(job.shard_size, shards))), unit="seq", unit_scale=True) as bar:
        for num_sequences in ordered_map(partial(fill_shard, job), shards):
            bar.update(num_sequences)


def _finished_entries(job: Job, ordered_map: Callable) -> list[dict]:
    """The manifest's entries of all shards. Raises ValueError where slices have not written theirs yet."""
    files = [job.shard_file(shard) for shard in range(len(job.shard_start) - 1)]
    if absent := [file.name for file in files if not file.exists()]:
        raise ValueError(
            f"{job.output} is not complete: {len(absent)} of {len(files)} shards are missing, the first {absent[0]}; "
            "give all its --slice commands again (what is done is not done again), then --finish"
        )
    return list(tqdm(ordered_map(shard_entry, files), "checksum", len(files), unit="shard"))


def cut_into_chunks(sentence_start: np.ndarray, document_start: np.ndarray, duplicates: int) -> list[range]:
    """Ranges of whole documents with about CHUNK_TOKENS tokens each, duplicates counted: the units of planning."""
    token_of_document = sentence_start[document_start]
    chunk_of_document = token_of_document[:-1] // max(1, CHUNK_TOKENS // duplicates)
    starts = np.flatnonzero(np.diff(chunk_of_document, prepend=-1))
    stops = np.append(starts[1:], len(chunk_of_document))
    return [range(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True)]


def default_num_shards(num_sequences: int, seq_length: int) -> int:
    return min(num_sequences, max(MIN_SHARDS, -(-num_sequences * seq_length // SHARD_TOKENS)))


def plan_chunk(job: Job, numbered_chunk: tuple[int, range]) -> np.ndarray:
    """Write the instances of a chunk (its number, its documents) in the order of their shuffled positions.

    Returns their totals, int64 [3].
    """
    chunk, documents = numbered_chunk
    if job.chunk_file(chunk).exists():
        return total(np.load(job.chunk_file(chunk), mmap_mode="r"))
    bounds = [np.load(job.output / "plan" / f"{name}.npy", mmap_mode="r") for name in ("sentences", "documents")]
    first, last = job.chunk_start[chunk : chunk + 2]
    instances = make_instances(*bounds, documents, job.config.instance_rule, last - first)
    instances["position"] = shuffled_positions(first, last, job.num_sequences, job.config.seed)
    with finished_file(job.chunk_file(chunk)) as file:
        np.save(file, instances[np.argsort(instances["position"])])
    return total(instances)


def fill_shard(job: Job, shard: int) -> int:
    """Write one shard, unless it is there; returns the number of its sequences."""
    path = job.shard_file(shard)
    if path.exists():
        return job.shard_size(shard)
    instances = _instances_of_shard(job, shard)
    token_ids = np.memmap(job.token_file, job.token_dtype, mode="r")
    blocks = [
        _mask_block(job, token_ids, instances[first : first + BLOCK_SEQUENCES])
        for first in range(0, len(instances), BLOCK_SEQUENCES)
    ]
    write_shard(path, join_records(blocks))
    return job.shard_size(shard)


def _instances_of_shard(job: Job, shard: int) -> np.ndarray:
    first, last = job.shard_start[shard : shard + 2]
    slices = []
    for chunk in range(len(job.chunk_start) - 1):
        plan = np.load(job.chunk_file(chunk), mmap_mode="r")
        # bisect touches a few pages of the file where searchsorted would copy the whole column.
        slices.append(plan[bisect_left(plan["position"], first) : bisect_left(plan["position"], last)])
    instances = np.concatenate(slices)
    return instances[np.argsort(instances["position"])]


def _mask_block(job: Job, token_ids: np.ndarray, instances: np.ndarray) -> Records:
    records = assemble(token_ids, instances, cls_id=job.cls_id, sep_id=job.sep_id, dtype=job.shard_dtype)
    return mask_sequences(records, instances["position"], job.masking, seed=job.config.seed)


def check_config(config: BuildConfig) -> None:
    """Raise ValueError for the first value outside its rule."""
    rules = {
        "seq_length": (8 <= config.seq_length < 1 << 16, "between 8 and 65,535 tokens: positions are kept in 16 bits"),
        "max_predictions": (
            1 <= config.max_predictions < config.seq_length,
            f"at least 1 and less than seq_length={config.seq_length}; 20 is usual for 128 and 80 for 512",
        ),
        "duplicates": (config.duplicates >= 1, "at least 1"),
        "pair_task": (config.pair_task in PAIR_TASKS, f"one of {', '.join(PAIR_TASKS)}"),
        "max_ngram": (1 <= config.max_ngram <= 10, "between 1 and 10; 3 is usual for n-gram masking"),
        "masked_lm_prob": (0 < config.masked_lm_prob < 1, "between 0 and 1, both excluded; 0.15 is usual"),
        "short_seq_prob": (0 <= config.short_seq_prob <= 1, "between 0 and 1; 0.1 is usual"),
        "seed": (0 <= config.seed < 1 << 63, "at least 0 and below 2**63"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"{name}={getattr(config, name)} must be {rule}")


def check_vocabulary(corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Raise ValueError where the corpus was made with another vocabulary, as far as the corpus tells."""
    if corpus.manifest is not None:
        told, ours = corpus.manifest["vocab"], tokenizer.describe()
        for key in ("sha256", "lower_case", "strip_accents"):
            if told.get(key, ours[key]) != ours[key]:
                raise ValueError(
                    f"vocabulary {tokenizer.path} ({key} {ours[key]}) is not the one the corpus was tokenised with "
                    f"({told[key]}); give that one or tokenise again with `python -m data_prep.corpus`"
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


def _share_bounds(folder: Path, sentence_start: np.ndarray, document_start: np.ndarray) -> None:
    """Leave the corpus' bounds where every worker can map them."""
    folder.mkdir(exist_ok=True)
    for name, bounds in (("sentences", sentence_start), ("documents", document_start)):
        with finished_file(folder / f"{name}.npy") as file:
            np.save(file, bounds)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    default = BuildConfig()
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.build",
        description="Make masked training sequences from a tokenised corpus: sentence pairs, masks, shuffled shards. "
        "The output is the same for any number of workers; an interrupted build goes on where it was.",
        epilog="example: python -m data_prep.build --corpus runs/corpus --output runs/shards --seq-length 128",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--corpus", required=True, metavar="DIR", help="what data_prep.corpus made, or a Megatron prefix (.bin/.idx)")
    add("--vocab", metavar="FILE", help="vocabulary of a corpus that another program made; ours carry their own")
    add_case_arguments(parser)
    add("--output", required=True, metavar="DIR", help="folder for the shards, empty or new")
    add("--seq-length", type=int, default=default.seq_length, help="tokens a sequence, special ones included")
    add("--max-predictions", type=int, default=default.max_predictions, help="masked tokens a sequence at most")
    add("--duplicates", type=int, default=default.duplicates, help="times the corpus is used, each with other masks")
    add("--pair-task", choices=tuple(PAIR_TASKS), default=default.pair_task, help="next sentence, order, or none")
    add("--masked-lm-prob", type=float, default=default.masked_lm_prob, help="share of the tokens that are masked")
    add("--whole-word", action="store_true", help="mask all pieces of a word together")
    add("--max-ngram", type=int, default=default.max_ngram, help="mask runs of up to so many tokens, or whole words")
    add("--short-seq-prob", type=float, default=default.short_seq_prob, help="share of documents cut shorter")
    add("--seed", type=int, default=default.seed, help="another seed, other pairs, masks and order")
    add("--num-shards", type=int, metavar="N", help="files to write (default: 32 MB of tokens each, at least 8)")
    add("--workers", type=int, default=1, metavar="N", help="processes")
    add_slice_arguments(parser, "the plan of what goes where")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(main)
