"""Distillation: the loss by hand, a student that learns from its teacher alone, teachers that do not fit."""

import json
import math

import numpy as np
import pytest
import torch

from evaluation.distill import distill
from evaluation.finetune import main
from evaluation.tasks.classification import TextTask, text_task
from evaluation.tasks.features import Features, gather_batch
from tests.evaluation.test_finetune import MODEL, arguments, read, task
from tests.evaluation.test_finetune_on_ranks import DRY, fine_tune_on_a_rank, losses_scores_weights
from tests.ranks import run_ranks

__all__ = ["task"]  # the fixture
SMALL = {"hidden_size": 16, "intermediate_size": 32}


def loss_of(labels, teacher, logits, classes, weight, temperature):
    """[2] Of two sequences, through the features and a batch as the loop makes it; and the task's own."""
    own = text_task(TextTask("own", ("sentence",), "label", classes, ("accuracy",)))
    features = Features(np.arange(7), np.array([0, 3, 7]), np.array([3, 4]), labels, note="")
    taught, with_teacher = distill(own, features, list(teacher), weight, temperature)
    assert with_teacher.num_targets(np.arange(2)) == 2
    sequences, joined = gather_batch(with_teacher, np.array([1, 0]))
    _, plain = gather_batch(features, np.array([1, 0]))
    expected = own.loss(logits.flip(0), plain, sequences)
    torch.testing.assert_close(taught.loss(logits.flip(0), plain, sequences), expected, rtol=0, atol=0)
    return taught.loss(logits.flip(0), joined, sequences).flip(0), expected.flip(0)


def test_classes_by_hand():
    """T = 2, a = 0.25. Teacher (2 ln 4, 0): softened 0.8, 0.2; student (0, 2 ln 4): 0.2, 0.8, label 0."""
    teacher = torch.tensor([[2 * math.log(4), 0.0], [1.0, 1.0]])
    logits = torch.tensor([[0.0, 2 * math.log(4)], [3.0, 3.0]])
    loss, own = loss_of(np.array([0, 1]), teacher, logits, ("no", "yes"), 0.25, 2.0)
    divergence = 0.8 * math.log(0.8 / 0.2) + 0.2 * math.log(0.2 / 0.8)
    assert own.tolist() == pytest.approx([math.log(17), math.log(2)])
    assert loss.tolist() == pytest.approx([0.75 * math.log(17) + 0.25 * 4 * divergence, 0.75 * math.log(2)])


def test_scores_by_hand():
    labels, teacher = np.array([1.0, 2.0], np.float32), torch.tensor([[3.0], [2.0]])
    loss, _ = loss_of(labels, teacher, torch.tensor([[2.0], [0.5]]), (), 0.25, 2.0)
    assert loss.tolist() == pytest.approx([0.75 * 1 + 0.25 * 1, 0.75 * 2.25 + 0.25 * 2.25])


def test_a_smaller_model_learns_from_its_teacher_alone(task, capsys):
    """Every label of the student's training set is wrong; two seeds of the teacher give the right ones. On two ranks it
    learns the same.
    """
    main(arguments(task, "teacher", seeds=[0, 1], epochs=2))
    (task / "small.json").write_text(json.dumps(MODEL | SMALL), encoding="utf-8")
    swapped = {"red\n": "green\n", "green\n": "red\n"}
    lines = (task / "train.tsv").read_text().splitlines(keepends=True)
    texts = [line.split("\t")[0] + "\t" + swapped.get(line.split("\t")[1], "label\n") for line in lines]
    (task / "wrong.tsv").write_text("".join(texts), encoding="utf-8")
    flags = {"seeds": [0], "model": task / "small.json", "train-file": "wrong.tsv", "epochs": 4}
    taught = flags | {"teacher": task / "teacher", "distill-weight": 1}
    main(arguments(task, "taught", **taught))
    assert read(task / "taught/results.json")["last"]["accuracy"]["mean"] == 1.0
    settings = read(task / "taught/run.json")["distillation"]
    assert (len(settings["teacher"]), settings["weight"], settings["temperature"]) == (2, 1.0, 2.0)

    (task / "dry.json").write_text(json.dumps(MODEL | SMALL | DRY), encoding="utf-8")
    taught |= {"model": task / "dry.json", "epochs": 1, "max-train-examples": 41}
    main(arguments(task, "one", **taught))
    run_ranks(fine_tune_on_a_rank, 2, arguments(task, "two", **taught))
    one, two = (losses_scores_weights(task / run) for run in ("one", "two"))
    error = max(abs(loss - expected) for loss, expected in zip(two[0], one[0], strict=True))
    print(f"losses {error:.1e}")
    assert one[1] == two[1] and error < 1e-6  # measured: 3.6e-7


MISFITS = [
    ({"temperature": 2}, "--temperature goes with --teacher; name a run"),
    ({"teacher": "nowhere"}, "nowhere has no run.json"),
    ({"teacher": "teacher", "distill-weight": 1.5}, r"argument --distill-weight: 1.5 is above 1"),
    ({"teacher": "teacher", "temperature": 0}, r"argument --temperature: 0 is not above 0"),
    (
        {"teacher": "teacher", "task": "regression", "train-file": "scores.tsv", "dev-file": "scores.tsv"},
        r"was trained on classification \(green, red\), this is regression \(a score\); name a run of the same",
    ),
    (
        {"teacher": "teacher", "task": "ner", "train-file": "words.txt", "dev-file": "words.txt"},
        "ner does not have one label or",
    ),
    ({"teacher": "teacher", "vocab": "other.txt"}, "has another vocabulary, vocab.txt with sha256"),
    ({"teacher": "teacher", "model": "long.json", "seq-length": 20}, "has positions for 16 tokens; lower"),
    ({"teacher": "teacher", "checkpoint": "ngram", "model": None, "vocab": None}, "ngram is not a network"),
]


def test_a_teacher_that_does_not_fit_is_refused(task, capsys):
    main(arguments(task, "teacher", seeds=[0], epochs=1))
    (task / "scores.tsv").write_text("sentence\tlabel\nthe box\t1.5\n", encoding="utf-8")
    (task / "words.txt").write_text("the O\nbox B-X\n", encoding="utf-8")
    (task / "other.txt").write_text((task / "vocab.txt").read_text().replace("hat", "cap"), encoding="utf-8")
    (task / "long.json").write_text(json.dumps(MODEL | {"max_position_embeddings": 32}), encoding="utf-8")
    for changes, message in MISFITS:
        paths = {name: task / changes[name] for name in ("teacher", "vocab", "model") if changes.get(name)}
        with pytest.raises(ValueError, match=message):
            main(arguments(task, "student", **changes | paths))
        assert not (task / "student").exists()
