"""Runs every benchmark, one after another, then generates docs/performance.md from all saved results.

    make bench           without a GPU      or    python -m benchmarks.all [TOPIC ...]
    make bench-gpu       on one GPU         or    python -m benchmarks.all --gpu

The data are shards of the documentation installed on this machine, which are built once. Nothing else should run at the
same time. If a topic fails, the others still run, and it is named at the end.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

DATA = Path("runs/bench")
TEXT, VOCAB = DATA / "text/pretrain", DATA / "vocab/vocab.txt"
SHARDS = {length: DATA / f"shards-{length}" for length in (128, 512)}
TWO_RANKS = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--module"]
TOPICS = {  # module and arguments of each command
    "floors": [["benchmarks.floors", "--text", TEXT / "train.jsonl", "--vocab", VOCAB, "--data", SHARDS[128],
                "--repeats", 3]],
    "data_prep": [["benchmarks.data_prep", "--input", TEXT, "--vocab", VOCAB, "--megabytes", 5, "--repeats", 2]],
    "loader": [["benchmarks.loader", "--data", SHARDS[128]]],
    "step": [["benchmarks.step", "--data", SHARDS[128], "--steps", 1, "--repeats", 3, "--profile"],
             ["benchmarks.step", "--data", SHARDS[512], "--steps", 1, "--micro-batch", 2, "--repeats", 3]],
    "optimizer": [["benchmarks.optimizer"], ["benchmarks.optimizer", "--model", "large", "--layers", 6]],
    "scaling": [["benchmarks.scaling", "--data", SHARDS[128], "--repeats", 1]],
    "work": [["benchmarks.work"], [*TWO_RANKS, "benchmarks.work"]],
}  # fmt: skip
LARGE = ["--model", "large", "--bf16", "--steps", 4, "--repeats", 3]
GPU_TOPICS = {
    "step": [["benchmarks.step", "--full", 128, "--micro-batch", 256, *LARGE, "--profile", "--largest"],
             ["benchmarks.step", "--data", SHARDS[128], "--micro-batch", 256, *LARGE],
             ["benchmarks.step", "--data", SHARDS[512], "--micro-batch", 64, *LARGE, "--against", "transformers",
              "megatron"],
             ["benchmarks.step", "--full", 512, "--model", "3.9b", "--layers", 4, "--micro-batch", 16, "--bf16",
              "--against"]],
    "optimizer": [["benchmarks.optimizer", "--model", "large"]],
}  # fmt: skip
SMALL = {"large": "tiny", "3.9b": "tiny", 256: 4, 64: 2, 16: 2, "--largest": "--bf16"}  # replacements made by --dry


def run(*command: object) -> bool:
    """Runs `python -m command`, prints how long it took, and returns whether it succeeded."""
    print(f"\n=== {' '.join(map(str, command))}", flush=True)
    started = time.monotonic()
    code = subprocess.run([sys.executable, "-m", *map(str, command)]).returncode
    print(f"=== {time.monotonic() - started:.0f} s, exit code {code}", flush=True)
    return code == 0


def prepare() -> bool:
    """Makes text, vocabulary, corpus and shards, unless they exist."""
    text, corpus = TEXT / "train.jsonl", DATA / "corpus"
    vocab = ("--type", "wordpiece", "--size", 30_522, "--output", VOCAB.parent)
    steps = [
        ("data_prep.python_docs", "--output", DATA / "text"),
        ("data_prep.vocab", "--input", text, *vocab),
        ("data_prep.corpus", "--input", text, "--vocab", VOCAB, "--output", corpus),
    ]
    for length, shards in SHARDS.items():
        sizes = ("--seq-length", length, "--max-predictions", 20 * length // 128, "--duplicates", 1)
        steps.append(("data_prep.build", "--corpus", corpus, "--output", shards, *sizes))
    return all((shards / "manifest.json").exists() for shards in SHARDS.values()) or all(run(*step) for step in steps)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all", description=__doc__.split("\n\n")[0])
    parser.add_argument("topics", nargs="*", metavar="TOPIC", help=f"of {', '.join(TOPICS)} (default: all)")
    parser.add_argument("--gpu", action="store_true", help=f"{' and '.join(GPU_TOPICS)} on one GPU instead")
    parser.add_argument("--dry", action="store_true", help="the GPU's commands with tiny models, on any machine")
    parser.add_argument("--data-only", action="store_true", help="make the shards and stop")
    args = parser.parse_args()
    known = GPU_TOPICS if args.gpu or args.dry else TOPICS
    if unknown := set(args.topics) - set(known):
        parser.error(f"unknown topic {unknown.pop()!r}; choose from {', '.join(known)}")
    started = time.monotonic()
    if not prepare():
        sys.exit("error: the data for the benchmarks could not be made, see above")
    if args.data_only:
        return
    commands = [command for topic in args.topics or known for command in known[topic]]
    if args.dry:
        commands = [[SMALL.get(part, part) for part in command] for command in commands]
    else:
        commands = [*([*command, "--save"] for command in commands), ["benchmarks.document"]]
    failed = [command for command in commands if not run(*command)]
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes.")
    for command in failed:
        print(f"FAILED: {' '.join(map(str, command))}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
