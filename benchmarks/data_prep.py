"""Speed and memory of data preparation, by stage and compared with a peer, on any text.

    python -m benchmarks.data_prep --input TEXT... --vocab bert-base-uncased-vocab.txt --memory 65 650

The input is read once and repeated, with a different first line in each copy, until it has --megabytes. It is stored
in a temporary folder as raw text and as one sentence per line. One MB is 10^6 bytes of that text. Commands run in one
process unless a table says two. The peer does less: its collator makes no pairs, writes nothing, and ignores documents.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil

from benchmarks.measure import high_water_mark, parser, report
from data_prep import build, corpus
from data_prep.cli import run_cli
from data_prep.shards import Shards
from data_prep.text.cleaning import normalise, paragraphs
from data_prep.text.documents import find_files, read_documents, sample_documents
from data_prep.text.sentences import SentenceSplitter, train_splitter
from data_prep.text.tokenizer import Tokenizer, load_tokenizer

SEQ_LENGTH, MAX_PREDICTIONS, DUPLICATES = 128, 20, 5
DOCUMENT_CHARACTERS = 20_000  # books are cut into documents of about the size of a long article


def documents_of(paths: list[str]) -> list[list[str]]:
    """The documents of the input as lists of clean paragraphs, cut to about DOCUMENT_CHARACTERS each."""
    documents: list[list[str]] = []
    for document in read_documents(find_files(paths)):
        part, size = [], 0
        for block in paragraphs(normalise(document.text), one_a_line=document.is_split):
            part.append(block)
            size += len(block)
            if size > DOCUMENT_CHARACTERS:
                documents.append(part)
                part, size = [], 0
        if part:
            documents.append(part)
    return documents


def repeated(documents: list[list[str]], megabytes: float) -> Iterator[list[str]]:
    """Repeats the documents with a different first line in each copy, so that none is dropped as a duplicate."""
    size, turn = 0, 0
    while True:
        for document in documents:
            yield [f"Copy {turn}." if turn else "", *document]
            size += sum(len(block.encode()) + 2 for block in document)
            if size >= megabytes * 1e6:
                return
        turn += 1


def write_raw(path: Path, documents: Iterator[list[str]], splitter: SentenceSplitter | None = None) -> float:
    """Writes a folder of text files or, with a splitter, one file of one sentence per line; returns its size in MB."""
    if splitter:
        path.parent.mkdir(exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            for document in documents:
                file.writelines(f"{sentence}\n" for block in document if block for sentence in splitter.split(block))
                file.write("\n")
        return path.stat().st_size / 1e6
    path.mkdir()
    for number, document in enumerate(documents):
        (path / f"{number:06d}.txt").write_text("\n\n".join(filter(None, document)), encoding="utf-8")
    return size_on_disk(path)


def size_on_disk(folder: str | Path) -> float:
    """Size of the files in a folder, in MB."""
    return sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the progress bars and messages of commands."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def seconds_of(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    with quiet():
        work()
    return clock() - start


class Bench:
    """The folders of one measurement, and our commands with them as arguments."""

    def __init__(self, folder: Path, vocab: str) -> None:
        self.folder, self.vocab, self.number = folder, vocab, 0

    def new(self) -> str:
        self.number += 1
        return str(self.folder / str(self.number))

    def corpus_arguments(self, text: Path, format: str, workers: int) -> list[str]:
        return ["--input", str(text), "--format", format, "--vocab", self.vocab, "--workers", str(workers)]

    def build_arguments(self, corpus_folder: str, workers: int) -> list[str]:
        sizes = {"seq-length": SEQ_LENGTH, "max-predictions": MAX_PREDICTIONS, "duplicates": DUPLICATES}
        options = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
        return ["--corpus", corpus_folder, "--workers", str(workers), *options]

    def tokenise(self, text: Path, format: str, workers: int = 1, clock=time.perf_counter) -> tuple[float, str]:
        """Returns (seconds without the training of Punkt, corpus folder)."""
        output, arguments = self.new(), self.corpus_arguments(text, format, workers)
        with quiet():
            corpus.main([*arguments, "--output", output, "--prepare"])
        steps = (["--slice", "0/1"], ["--finish"])
        seconds = seconds_of(lambda: [corpus.main([*arguments, "--output", output, *step]) for step in steps], clock)
        return seconds, output

    def shard(self, corpus_folder: str, workers: int = 1, clock=time.perf_counter) -> tuple[float, str]:
        output, arguments = self.new(), self.build_arguments(corpus_folder, workers)
        return seconds_of(lambda: build.main([*arguments, "--output", output]), clock), output

    def peak(self, command: str, arguments: list[str]) -> tuple[float, str]:
        """Runs a command with two workers; returns (peak memory of its largest process in MB, output folder)."""
        output = self.new()
        program = [sys.executable, "-m", f"data_prep.{command}", *arguments, "--output", output]
        process, peak = psutil.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), 0
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                peak = max(peak, *(high_water_mark(p.pid) for p in (process, *process.children(recursive=True))))
            time.sleep(0.05)
        if process.returncode:
            raise OSError(f"data_prep.{command} ended with exit code {process.returncode}")
        return peak / 1e6, output


def speeds(bench: Bench, raw: Path, split: Path, megabytes: dict[str, float], repeats: int) -> list[dict]:
    """Speed of our stages on one core, in processor time, because other load does not change that. Each figure is the
    median of `repeats` rounds, after one that compiles.
    """
    rounds = []
    for turn in range(repeats + 1):
        row = {}
        split_s, split_corpus = bench.tokenise(split, "sentences", clock=time.process_time)
        shard_s, shards = bench.shard(split_corpus, clock=time.process_time)
        raw_s, raw_corpus = bench.tokenise(raw, "text", clock=time.process_time)
        raw_shard_s, _ = bench.shard(raw_corpus, clock=time.process_time)
        opened = Shards(shards)
        row["sentence-split text to shards, MB/s"] = megabytes["split"] / (split_s + shard_s)
        row["raw text to corpus, cleaned and split, MB/s"] = megabytes["raw"] / raw_s
        row["raw text to shards, MB/s"] = megabytes["raw"] / (raw_s + raw_shard_s)
        row["tokenised corpus to shards, sequences/s"] = opened.num_sequences / shard_s
        row["sequences per MB of text"] = opened.num_sequences / megabytes["split"]
        row["corpus on disk, MB per MB of text"] = size_on_disk(split_corpus) / megabytes["split"]
        row["shards on disk, MB per MB of text"] = size_on_disk(shards) / megabytes["split"]
        if turn:
            rounds.append(row)
    return [{"what": name, "median": float(np.median([row[name] for row in rounds]))} for name in rounds[0]]


def peers(split: Path, vocab: str, tokenizer: Tokenizer, megabytes: float, bench: Bench, repeats: int) -> list[dict]:
    """The same text through `datasets` + `tokenizers` + transformers' collator and through our commands, in turn."""
    import datasets
    from transformers import BertTokenizerFast, DataCollatorForLanguageModeling

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    fast = BertTokenizerFast(vocab_file=vocab, do_lower_case=tokenizer.folding.lower_case)
    collate = DataCollatorForLanguageModeling(fast, mlm_probability=0.15, return_tensors="np")
    body = SEQ_LENGTH - 2

    def grouped(batch: dict) -> dict:
        ids = [token for sentence in batch["input_ids"] for token in sentence]
        pieces = [ids[start : start + body] for start in range(0, len(ids) - body + 1, body)]
        return {"input_ids": [[fast.cls_token_id, *piece, fast.sep_token_id] for piece in pieces]}

    def theirs() -> None:
        with tempfile.TemporaryDirectory(dir=bench.folder) as cache:
            lines = datasets.load_dataset("text", data_files=str(split), split="train", cache_dir=cache)
            encode = {"function": lambda rows: {"input_ids": fast(rows["text"], add_special_tokens=False)["input_ids"]}}
            tokens = lines.map(**encode, batched=True, remove_columns=["text"])
            sequences = tokens.map(grouped, batched=True, batch_size=10_000)
            for _ in range(DUPLICATES):
                for start in range(0, len(sequences), 1_000):
                    collate([{"input_ids": ids} for ids in sequences[start : start + 1_000]["input_ids"]])

    def ours() -> None:
        output = bench.new()
        corpus.main([*bench.corpus_arguments(split, "sentences", 1), "--output", output])
        build.main([*bench.build_arguments(output, 1), "--output", bench.new()])

    times = {"ours, with pairs, to disk": [], "datasets + tokenizers + collator": []}
    for _ in range(repeats):
        for name, work in zip(times, (ours, theirs), strict=True):
            times[name].append(seconds_of(work))
    medians = {name: float(np.median(values)) for name, values in times.items()}
    slowest = medians["datasets + tokenizers + collator"]
    return [{"what": n, "MB/s": megabytes / s, "times as fast": slowest / s} for n, s in medians.items()]


def scaling(bench: Bench, documents: list[list[str]], size: float, repeats: int) -> list[dict]:
    """One worker and two on the same raw text, in turn: seconds, including the start of the processes, and ratio."""
    text = Path(bench.new())
    megabytes = write_raw(text, repeated(documents, size))
    seconds: dict[str, list[list[float]]] = {"raw text to corpus": [], "corpus to shards": []}
    for _ in range(repeats):
        made = [bench.tokenise(text, "text", workers) for workers in (1, 2)]
        seconds["raw text to corpus"].append([elapsed for elapsed, _ in made])
        seconds["corpus to shards"].append([bench.shard(made[0][1], workers)[0] for workers in (1, 2)])
    rows = []
    for name, turns in seconds.items():
        one, two = np.median(turns, axis=0)
        rows.append({"what": f"{name}, {megabytes:.0f} MB", "one, s": one, "two, s": two, "times as fast": one / two})
    return rows


def memory(bench: Bench, documents: list[list[str]], sizes: list[float]) -> list[dict]:
    """Peak memory of the largest process with two workers, for raw text of several sizes."""
    rows = []
    for size in sizes:
        text = Path(bench.new())
        megabytes = write_raw(text, repeated(documents, size))
        corpus_peak, corpus_folder = bench.peak("corpus", bench.corpus_arguments(text, "text", 2))
        build_peak, _ = bench.peak("build", bench.build_arguments(corpus_folder, 2))
        rows.append({"input MB": megabytes, "corpus, peak MB": corpus_peak, "build, peak MB": build_peak})
    return rows


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument(
        "--input", nargs="+", action="extend", required=True, metavar="PATH", help="text files, and folders of them"
    )
    options.add_argument("--vocab", required=True, metavar="FILE", help="a WordPiece vocab.txt")
    options.add_argument(
        "--megabytes", type=float, default=20.0, help="size of the text for measuring speed (default 20)"
    )
    options.add_argument(
        "--scaling", type=float, metavar="MB", help="compare one worker and two on a text of this size"
    )
    options.add_argument(
        "--memory",
        type=float,
        nargs="*",
        action="extend",
        default=[],
        metavar="MB",
        help="sizes of text for measuring memory",
    )
    options.add_argument("--no-peers", action="store_true", help="leave out the peers (pip install '.[bench]')")
    args = options.parse_args(argv)
    tokenizer = load_tokenizer(args.vocab)
    documents = documents_of(args.input)
    sample = sample_documents(read_documents(find_files(args.input)), 4_000_000)
    splitter = train_splitter(block for piece in sample for block in paragraphs(normalise(piece.text)))
    tables = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw, split = folder / "raw", folder / "split" / "text.txt"
        megabytes = {
            "raw": write_raw(raw, repeated(documents, args.megabytes)),
            "split": write_raw(split, repeated(documents, args.megabytes), splitter),
        }
        bench = Bench(folder, args.vocab)
        title = f"{megabytes['raw']:.0f} MB, WordPiece, sequences of {SEQ_LENGTH}, {DUPLICATES} duplicates, NSP"
        tables[title] = speeds(bench, raw, split, megabytes, args.repeats)
        if not args.no_peers:
            tables["Beside a peer, sentence-split text to masked sequences"] = peers(
                split, args.vocab, tokenizer, megabytes["split"], bench, args.repeats
            )
        if args.scaling:
            tables["Workers"] = scaling(bench, documents, args.scaling, args.repeats)
        if args.memory:
            tables["Peak memory of the largest process, two workers"] = memory(bench, documents, args.memory)
    report(f"data-prep-{args.megabytes:g}-mb", tables, args.save)


if __name__ == "__main__":
    run_cli(main)
