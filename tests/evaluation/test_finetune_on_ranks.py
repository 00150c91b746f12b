"""Fine-tuning on two ranks gives what one process gives, whatever the task, the ZeRO stage and the cut of a batch."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from data_prep.cli import parse
from evaluation.finetune import fine_tune, main, prepare_run
from evaluation.options import FinetuneOptions, check_batch_size
from pretrain.layout import init_layout
from tests.evaluation.test_finetune import MODEL, WORDS, arguments
from tests.ranks import free_ports, run_ranks

ROOT = Path(__file__).parents[2]
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FLAGS = {
    "pairs": {"task": "classification"},
    "words": {"task": "ner", "tag-scheme": "bioes"},
    "spans": {"task": "squad1", "doc-stride": 4, "max-query-length": 3},
}


def write_task(folder, kind):
    """33 examples, so that the last of the batches of 8 has one; 70 for dev, more than one batch of evaluation."""
    generator = random.Random(kind)

    def words(low, high):
        return generator.choices(WORDS, k=generator.randint(low, high))

    for split, count in (("train", 33), ("dev", 70)):
        if kind == "pairs":
            rows = [
                f"{' '.join(words(1, 6))}\t{' '.join(words(1, 6))}\t{generator.choice('ab')}\n" for _ in range(count)
            ]
            (folder / f"{split}.tsv").write_text("sentence1\tsentence2\tlabel\n" + "".join(rows), encoding="utf-8")
        elif kind == "words":
            tags = dict.fromkeys(WORDS, "O") | dict.fromkeys(("red", "green", "box"), "S-X")
            sentences = ["".join(f"{word} {tags[word]}\n" for word in words(1, 13)) for _ in range(count)]
            (folder / f"{split}.txt").write_text("\n".join([*sentences, ""]), encoding="utf-8")
        else:
            paragraphs = []
            for number in range(count):
                before, (answer,), after = words(1, 8), words(1, 1), words(1, 8)
                answers = [{"text": answer, "answer_start": len(" ".join(before)) + 1}]
                qas = [{"id": str(number), "question": "hat", "answers": answers}]
                paragraphs.append({"context": " ".join([*before, answer, *after]), "qas": qas})
            (folder / f"{split}-v1.1.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    (folder / "config.json").write_text(json.dumps(MODEL | DRY), encoding="utf-8")


def fine_tune_on_a_rank(argv):
    options = parse(FinetuneOptions, "evaluation.finetune", argv)
    run = prepare_run(options)
    options.output.mkdir(exist_ok=True)
    fine_tune(run, options.seeds, init_layout())


def losses_scores_weights(run):
    rows = [json.loads(line) for line in (run / "seed_0/metrics.jsonl").read_text().splitlines()]
    losses = [row.get("loss", row.get("dev_loss")) for row in rows]
    scores = [row["scores"] for row in rows if row["kind"] == "eval"]
    return losses, scores, load_file(run / "seed_0/model/model.safetensors")


CASES = [("pairs", 0, None), ("pairs", 1, None), ("pairs", 3, None), ("words", 0, None), ("words", 2, 1),
         ("spans", 1, None), ("spans", 3, 2)]  # task, ZeRO stage, --micro-batch-size  # fmt: skip


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Each task's folder with the run of one process in it."""
    folders = {}
    for kind, flags in FLAGS.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        write_task(folders[kind], kind)
        main(arguments(folders[kind], seeds=[0], epochs=2, **flags))
    return folders


@pytest.mark.parametrize(("kind", "stage", "micro_batch_size"), CASES)
def test_two_ranks_are_one_process(one_process, kind, stage, micro_batch_size):
    folder, name = one_process[kind], f"stage_{stage}_{micro_batch_size}"
    (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    more = {"deepspeed_config": folder / f"{name}.json", "micro-batch-size": micro_batch_size}
    run_ranks(fine_tune_on_a_rank, 2, arguments(folder, name, seeds=[0], epochs=2, **FLAGS[kind], **more))
    losses, scores, weights = losses_scores_weights(folder / name)
    expected_losses, expected_scores, expected_weights = losses_scores_weights(folder / "run")
    error = max(abs(loss - expected) for loss, expected in zip(losses, expected_losses, strict=True))
    far = max((weights[key] - weight).abs().max().item() for key, weight in expected_weights.items())
    print(f"{kind}, ZeRO {stage}: losses {error:.1e}, weights {far:.1e}, scores {expected_scores[-1]}")
    assert scores == expected_scores
    assert error < 5e-7  # measured: 2.4e-7
    assert far < 2e-4  # measured: 1.2e-4; Adam's first steps divide a rounding error by itself


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch-size": 7}, r"--batch-size 7 cannot be split over 2 ranks; choose from \[6, 8\] or another multiple"),
        ({"batch-size": 1}, r"--batch-size 1 cannot be split over 2 ranks; choose from \[2\]"),
        (
            {"micro-batch-size": 3},
            r"does not divide the 4 examples per step of each of 2 ranks; choose from \[1, 2, 4\]",
        ),
    ],
)
def test_a_batch_that_cannot_be_split_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        check_batch_size(parse(FinetuneOptions, "finetune", arguments(tmp_path, **changes)), num_ranks=2)


@pytest.mark.slow
def test_under_the_launcher(tmp_path):
    """One table, and one line of a mistake with its exit code."""
    write_task(tmp_path, "pairs")
    for changes, code in (({}, 0), ({"epochs": 3}, 2), ({"batch-size": 7, "output": tmp_path / "other"}, 2)):
        launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_ports(1)[0]), "--module"]
        argv = arguments(tmp_path, **FLAGS["pairs"] | {"seeds": [0], "epochs": 2} | changes)
        result = subprocess.run([*launcher, "evaluation.finetune", *argv], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == code, result.stdout + result.stderr
        counts = [result.stdout.count(text) for text in ("mean ± std", "; dev examples: ")]
        assert counts == [code == 0] * 2 and result.stderr.count("error: ") == (code == 2)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_other_down(tmp_path):
    """kill -9 of rank 1 of 2 without a launcher, which would end the other one at once. Measured: 16 s."""
    write_task(tmp_path, "pairs")
    argv = arguments(tmp_path, seeds=[0], epochs=100_000, **FLAGS["pairs"])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "WORLD_SIZE": "2"}
    ranks = []
    for rank in ("0", "1"):
        environment = {**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "-m", "evaluation.finetune", *argv]
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/seed_0/metrics.jsonl").exists():
        assert ranks[0].poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    ranks[1].kill()
    killed = time.monotonic()
    _, told = ranks[0].communicate(timeout=60)
    print(f"down after {time.monotonic() - killed:.1f} s")
    assert ranks[0].returncode == 1 and "in fine-tuning: another rank died" in told
    assert "Ranks that no longer answer: [1]" in told
    ranks[1].communicate()
