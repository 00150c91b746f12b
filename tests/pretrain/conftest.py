"""Real shards for the trainer's tests: the language reference that ships with Python, through the project's own command
lines.
"""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from data_prep import build, corpus, vocab


@pytest.fixture(scope="session")
def shard_folders(tmp_path_factory) -> tuple[Path, Path]:
    """(training shards, held-out shards): sequences of 64 tokens, a SentencePiece vocabulary of 500."""
    folder = tmp_path_factory.mktemp("shards")
    names = sorted(topics)
    for split, chosen in (("train", names[::3] + names[1::3]), ("heldout", names[2::12])):
        lines = (json.dumps({"id": name, "text": topics[name]}) + "\n" for name in chosen)
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    vocab.main(
        ["--input", f"{folder}/train.jsonl", "--type", "sentencepiece", "--size", "500", "--output", f"{folder}/vocab"]
    )
    for split in ("train", "heldout"):
        corpus.main(
            ["--input", f"{folder}/{split}.jsonl", "--vocab", f"{folder}/vocab", "--output", f"{folder}/{split}_corpus"]
        )
        build.main(
            ["--corpus", f"{folder}/{split}_corpus", "--output", f"{folder}/{split}", "--seq-length", "64",
               "--max-predictions", "10", "--duplicates", "1", "--pair-task", "nsp", "--seed", "0"]
        )  # fmt: skip
    return folder / "train", folder / "heldout"


@pytest.fixture
def vocabulary(shard_folders) -> Path:
    """The vocabulary of these shards."""
    (path,) = shard_folders[0].glob("*.model")
    return path
