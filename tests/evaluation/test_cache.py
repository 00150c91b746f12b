"""Features kept from run to run: read instead of made, missed after any change, never trusted when damaged."""

import json
import multiprocessing
import time
from dataclasses import fields

import numpy as np
import pytest

from data_prep.text.tokenizer import WordPiece
from evaluation.cache import cached_features
from evaluation.finetune import main
from evaluation.tasks.features import Features
from tests.evaluation.test_finetune import arguments, read
from tests.evaluation.test_finetune_on_ranks import FLAGS, write_task

FEATURES = Features(np.arange(90), np.array([0, 40, 90]), np.array([20, 50]), np.array([1.5, 2.5], np.float32), "né 1")


def fine_tune(folder, output, **changes):
    """Train losses and dev scores of a run with a cache."""
    main(arguments(folder, output, **{"seeds": [0], "epochs": 1, "cache": folder / "cache"} | changes))
    (epoch,) = read(folder / output / "seed_0/finished.json")["epochs"]
    return epoch["train_loss"], epoch["dev_loss"], epoch["scores"]


def num_cached(folder):
    return len(list((folder / "cache").iterdir()))


@pytest.mark.parametrize("kind", FLAGS)
def test_the_second_run_tokenises_nothing(tmp_path, monkeypatch, capsys, kind):
    write_task(tmp_path, kind)
    first = fine_tune(tmp_path, "first", **FLAGS[kind])
    note = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training examples: ")]
    monkeypatch.setattr(WordPiece, "encode", None)
    monkeypatch.setattr(WordPiece, "encode_with_offsets", None)
    assert fine_tune(tmp_path, "second", **FLAGS[kind]) == first
    assert note[0] in capsys.readouterr().out and num_cached(tmp_path) == 2


def test_any_change_of_what_makes_them_is_seen(tmp_path, capsys):
    write_task(tmp_path, "pairs")
    flags, counts = dict(FLAGS["pairs"]), []
    for number, change in enumerate(
        [{}, {"learning-rate": 0.001}, {"seq-length": 15}, {"max-train-examples": 20}, "train.tsv", "vocab.txt"]
    ):
        if isinstance(change, dict):
            flags |= change
        else:
            path = tmp_path / change
            path.write_text(path.read_text().replace("hat", "cat", 1))
        fine_tune(tmp_path, f"run_{number}", **flags)
        counts.append(num_cached(tmp_path))
    assert counts == [2, 2, 4, 5, 6, 8]


def test_a_damaged_file_is_reported_and_replaced(tmp_path, capsys):
    def cached(**identity):
        return cached_features(tmp_path, identity, Features, lambda: FEATURES)

    cached(file="a")
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(0, len(whole), 19)]
    for content in (b"", whole[:31], whole[: len(whole) // 2], whole[:-1], whole + b"x", *flipped):
        path.write_bytes(content)
        cached(file="a")
        assert capsys.readouterr().err == f"{path} is damaged: it is removed and written again\n"
        assert path.read_bytes() == whole
    again = cached(file="a")
    assert capsys.readouterr().err == "" and again is not FEATURES and again.note == FEATURES.note
    for field in fields(Features)[:-1]:
        found, expected = getattr(again, field.name), getattr(FEATURES, field.name)
        assert np.array_equal(found, expected) and found.dtype == expected.dtype


def fill(folder, numbers):
    for number in numbers:
        many = Features(np.full(2_000_000, number), *[np.zeros(1)] * 3, note="")
        assert cached_features(folder, {"number": number}, Features, lambda many=many: many).token_ids[-1] == number


def test_processes_that_are_killed_or_many_leave_whole_files(tmp_path, capsys):
    fork = multiprocessing.get_context("fork")
    killed = fork.Process(target=fill, args=(tmp_path, range(1000)))
    killed.start()
    deadline = time.monotonic() + 60
    while not (list(tmp_path.glob("*.features")) and list(tmp_path.glob("*.tmp"))):
        assert killed.is_alive() and time.monotonic() < deadline
    killed.kill()
    killed.join()
    assert list(tmp_path.glob("*.tmp"))
    together = [fork.Process(target=fill, args=(tmp_path, range(3))) for _ in range(3)]
    for process in together:
        process.start()
    for process in together:
        process.join()
    assert [process.exitcode for process in together] == [0, 0, 0]
    assert "damaged" not in capsys.readouterr().err


def test_a_cache_that_is_a_file_is_refused(tmp_path):
    write_task(tmp_path, "pairs")
    (tmp_path / "cache").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="--cache .* is a file; name a folder"):
        fine_tune(tmp_path, "run", **FLAGS["pairs"])
    assert not (tmp_path / "run").exists()
