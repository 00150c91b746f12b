"""Every benchmark of this machine, one after another, then docs/performance.md from all saved results.

    make bench           what needs no GPU        or    python -m benchmarks.all [TOPIC ...]
    make bench-gpu       what needs one           or    python -m benchmarks.all --gpu

The data are the documentation on this machine, made into shards once. Nothing else should run meanwhile.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

DATA = Path("runs/bench")
SHARDS = {length: DATA / f"shards-{length}" for length in (128, 512)}
TOPICS = {
    "data_prep": [["--input", DATA / "text/pretrain", "--vocab", DATA / "vocab/vocab.txt", "--megabytes", 5,
                   "--repeats", 2, "--scaling", 100]],
    "loader": [["--data", SHARDS[128]]],
    "model": [["--data", SHARDS[128], "--model", "base", "--batches", 2, "--repeats", 3, "--compile"],
              ["--data", SHARDS[512], "--model", "base", "--batches", 1, "--batch-size", 2, "--repeats", 3]],
    "optimizer": [["--model", "base"], ["--model", "large", "--layers", 6]],
    "scaling": [["--data", SHARDS[128], "--repeats", 2]],
    "work": [[]],
}  # fmt: skip
LARGE = ["--model", "large", "--bf16", "--steps", 4, "--repeats", 3]
GPU_TOPICS = {
    "step": [["--full", 128, "--micro-batch", 256, *LARGE, "--compile", "--profile", "--largest"],
             ["--data", SHARDS[128], "--micro-batch", 256, *LARGE, "--compile"],
             ["--data", SHARDS[512], "--micro-batch", 64, *LARGE],
             ["--full", 512, "--model", "3.9b", "--layers", 4, "--micro-batch", 16, "--bf16", "--alone"]],
    "optimizer": [["--model", "base"], ["--model", "large"]],
}  # fmt: skip


def run(module: str, *arguments: object) -> None:
    """`python -m module arguments`; ends this program with its exit code if that is not 0."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    print(f"\n=== {' '.join(command[1:])}", flush=True)
    if code := subprocess.run(command).returncode:
        sys.exit(code)


def prepare() -> None:
    """Text -> vocabulary -> corpus -> shards; what is there is kept."""
    run("data_prep.python_docs", "--output", DATA / "text")
    text = DATA / "text/pretrain/train.jsonl"
    run("data_prep.vocab", "--input", text, "--type", "wordpiece", "--size", 8192, "--output", DATA / "vocab")
    run("data_prep.corpus", "--input", text, "--vocab", DATA / "vocab", "--output", DATA / "corpus")
    for length, shards in SHARDS.items():
        sizes = ("--seq-length", length, "--max-predictions", 20 * length // 128, "--duplicates", 1)
        run("data_prep.build", "--corpus", DATA / "corpus", "--output", shards, *sizes)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all", description=__doc__.split("\n\n")[0])
    parser.add_argument("topics", nargs="*", metavar="TOPIC", help=f"of {', '.join(TOPICS)} (default: all)")
    parser.add_argument("--gpu", action="store_true", help=f"{' and '.join(GPU_TOPICS)} on one GPU instead")
    args = parser.parse_args()
    known = GPU_TOPICS if args.gpu else TOPICS
    if unknown := set(args.topics) - set(known):
        parser.error(f"unknown topic {unknown.pop()!r}; choose from {', '.join(known)}")
    started = time.monotonic()
    prepare()
    for topic in args.topics or known:
        for arguments in known[topic]:
            run(f"benchmarks.{topic}", *arguments, "--save")
    run("benchmarks.document")
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
