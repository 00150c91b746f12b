"""Predictions for files without labels, and the same answers from transformers, which loads the same folder."""

import csv
import json

import numpy as np
import pytest
import transformers

from data_prep.cli import run_cli
from evaluation.finetune import main
from evaluation.predict import main as predict_main
from evaluation.tasks.by_name import restore_task
from evaluation.tasks.classification import text_task
from evaluation.tasks.glue import GLUE_TASKS, MNLI_SUBMISSIONS, SUBMISSIONS, write_submission
from tests.evaluation.test_finetune import WORDS, arguments, read, task

__all__ = ["task"]  # the fixture
SENTENCES = ["the green hat is here", "red box", "the hat", "box green the red here here is is hat red"]


def predict(run, path, *more):
    predict_main(["--run", str(run), "--file", str(path), *more])
    return run / "predictions" / path.name


def table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def test_classification_gives_the_pipelines_answers(task, capsys):
    main(arguments(task, seeds=[0, 1], epochs=1))
    path = task / "new.tsv"
    path.write_text("sentence\n" + "\n".join(SENTENCES) + "\n", encoding="utf-8")
    rows = table(predict(task / "run", path) / "predictions.tsv")
    printed = capsys.readouterr().out
    assert "4 examples (0 of 4 cut to 16 tokens), predicted by seed" in printed
    seed = printed.split("predicted by seed ")[1][0]
    pipeline = transformers.pipeline("text-classification", model=str(task / f"run/seed_{seed}/model"), top_k=None)
    for row, theirs in zip(rows, pipeline(SENTENCES), strict=True):
        assert row["prediction"] == theirs[0]["label"]
        for answer in theirs:
            assert float(row[f"p({answer['label']})"]) == pytest.approx(answer["score"], abs=2e-6)  # measured: 5.2e-7
    # The same file finds its work done, wherever it lies; another one of the same name is no answer to this one.
    (task / "copy").mkdir()
    for folder in (task, task / "copy"):
        (folder / "new.tsv").write_bytes(path.read_bytes())
        predict(task / "run", folder / "new.tsv")
        assert "reused" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"/new.tsv holds another run \(seed: '\d' there, '\d' requested; weights: "):
        predict(task / "run", path, "--seeds", str(1 - int(seed)))
    (task / "copy/new.tsv").write_text("sentence\nthe hat\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"/new.tsv holds another run \(sha256: '\w{64}' there.*; choose another folder or rem"
    ):
        predict(task / "run", task / "copy/new.tsv")
    (task / "run/predictions/new.tsv").rename(task / "run/predictions/kept")
    assert len(table(predict(task / "run", task / "copy/new.tsv") / "predictions.tsv")) == 1


def test_several_seeds_answer_together(task, capsys):
    """By the mean of their logits, which for two classes is the mean of their log odds."""
    main(arguments(task, seeds=[0, 1, 2], epochs=1))
    log_odds = []
    for seeds in (["0"], ["2"], ["0", "2"]):
        path = task / f"new_{len(log_odds)}.tsv"
        path.write_text("sentence\n" + "\n".join(SENTENCES) + "\n", encoding="utf-8")
        rows = table(predict(task / "run", path, "--seeds", *seeds) / "predictions.tsv")
        log_odds.append([np.log(float(row["p(red)"]) / float(row["p(green)"])) for row in rows])
    assert "predicted by seed 0, 2" in capsys.readouterr().out
    assert log_odds[2] == pytest.approx(np.mean(log_odds[:2], axis=0), abs=1e-3)
    assert log_odds[0] != pytest.approx(log_odds[1], abs=1e-2)


def test_pairs_and_scores_give_the_pipelines_answers(task, capsys):
    rows = "".join(f"the {WORDS[i % 2]}\tthe box\t{i % 2 + i / 100}\n" for i in range(16))
    (task / "scores.tsv").write_text("sentence1\tsentence2\tlabel\n" + rows, encoding="utf-8")
    files = {"train-file": "scores.tsv", "dev-file": "scores.tsv"}
    main(arguments(task, task="regression", seeds=[0], epochs=1, **files))
    found = table(predict(task / "run", task / "scores.tsv") / "predictions.tsv")
    pipeline = transformers.pipeline("text-classification", model=str(task / "run/seed_0/model"))
    pairs = [{"text": f"the {WORDS[i % 2]}", "text_pair": "the box"} for i in range(2)]
    for row, theirs in zip(found, [pipeline(pair) for pair in pairs], strict=False):
        assert float(row["prediction"]) == pytest.approx(theirs["score"], abs=1e-5)  # measured: 1.2e-6


def test_named_entities_give_the_pipelines_answers(task, capsys):
    rows = [f"the O\n{WORDS[i % 2]} S-{'X' if i % 2 else 'Y'}\nbox O\n\n" for i in range(16)]
    (task / "train.txt").write_text("".join(rows), encoding="utf-8")
    main(arguments(task, task="ner", seeds=[0], epochs=1, **{"dev-file": "train.txt"}))
    path = task / "new.txt"
    path.write_text("\n\n".join(sentence.replace(" ", "\n") for sentence in SENTENCES), encoding="utf-8")
    written = (predict(task / "run", path) / "predictions.txt").read_text(encoding="utf-8")
    pipeline = transformers.pipeline("token-classification", model=str(task / "run/seed_0/model"), ignore_labels=[])
    theirs = [[(row["word"], row["entity"]) for row in sentence] for sentence in pipeline(SENTENCES)]
    lines = [sentence.split("\n") for sentence in written.strip("\n").split("\n\n")]
    assert [[tuple(line.split("\t")[:2]) for line in sentence] for sentence in lines] == theirs


def test_answers_are_those_of_the_exported_model(task, capsys):
    """There is no pipeline for questions in today's transformers: the model's logits give the same answer."""
    qa = [{"id": str(i), "question": "hat", "answers": [{"text": WORDS[i % 2], "answer_start": 4}]} for i in range(16)]
    entries = [{"context": f"the {WORDS[i % 2]} box is here", "qas": [row]} for i, row in enumerate(qa)]
    (task / "train.json").write_text(json.dumps({"data": [{"paragraphs": entries}]}), encoding="utf-8")
    files = {"train-file": "train.json", "dev-file": "train.json", "max-query-length": 4}
    main(arguments(task, task="squad2", seeds=[0], epochs=1, **files))
    asked = [{"id": str(i), "question": "the hat"} for i in range(4)]
    entries = [{"context": context, "qas": [row]} for context, row in zip(SENTENCES, asked, strict=True)]
    (task / "new.json").write_text(json.dumps({"data": [{"paragraphs": entries}]}), encoding="utf-8")
    folder = predict(task / "run", task / "new.json")
    found, n_best, odds = (read(folder / f"{name}.json") for name in ("predictions", "nbest_predictions", "null_odds"))
    threshold = read(task / "run/results.json")["seeds"][0]["epochs"][-1]["scores"]["null_threshold"]

    model = transformers.AutoModelForQuestionAnswering.from_pretrained(task / "run/seed_0/model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(task / "run/seed_0/model")
    for i, context in enumerate(SENTENCES):
        inputs = tokenizer("the hat", context, return_tensors="pt", return_offsets_mapping=True)
        offsets = inputs.pop("offset_mapping")[0].tolist()
        output = model(**inputs)
        start, end = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        begin = inputs["token_type_ids"][0].tolist().index(1)
        spans = [(start[a] + end[b], a, b) for a in range(begin, len(start) - 1) for b in range(a, len(start) - 1)]
        score, first, last = max(spans)
        text = context[offsets[first][0] : offsets[last][1]]
        assert next(row["text"] for row in n_best[str(i)] if row["text"]) == text
        assert odds[str(i)] == pytest.approx(start[0] + end[0] - score, abs=1e-5)  # measured: 9.9e-7
        assert found[str(i)] == ("" if odds[str(i)] > threshold else text)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_epoch_kept_answers_with_its_own_threshold(task, capsys, keep):
    """Score, threshold and choice of seed are those of the epoch whose weights are there, whatever the other one's."""
    qa = [
        {"id": str(i), "question": "hat", "answers": [{"text": "red", "answer_start": 4}] * (i % 3)} for i in range(9)
    ]
    entries = [{"context": f"the red {WORDS[i % 4]} is here", "qas": [row]} for i, row in enumerate(qa)]
    (task / "dev.json").write_text(json.dumps({"data": [{"paragraphs": entries}]}), encoding="utf-8")
    files = {"train-file": "dev.json", "dev-file": "dev.json", "max-query-length": 4}
    main(arguments(task, task="squad2", seeds=[0, 1], epochs=1, **files, **{"keep-weights": keep}))
    results = read(task / "run/results.json")
    (trained,) = results["seeds"][1]["epochs"]
    # As if there had been another epoch: with it seed 0 would answer, and leave every question open.
    for row, f1, other in zip(results["seeds"], (0.0, 1.0), (1.0, 0.0), strict=True):
        row["epochs"][0]["scores"]["f1"] = f1
        another = {"epoch": 2, "scores": trained["scores"] | {"f1": other, "null_threshold": -1e9}}
        row["epochs"] = [*row["epochs"], another] if keep == "best" else [another, *row["epochs"]]
        row["best_epoch"] = 1 if keep == "best" else 2
    (task / "run/results.json").write_text(json.dumps(results), encoding="utf-8")
    found = read(predict(task / "run", task / "dev.json") / "predictions.json")
    assert "seed 1: dev f1 100.0 " in capsys.readouterr().out
    assert found == read(task / "run/seed_1/predictions.json") and any(found.values())


def test_a_fine_tuned_model_is_a_start_for_another_task(task, capsys):
    main(arguments(task, "first", seeds=[0], epochs=1))
    main(arguments(task, "second", task / "first/seed_0/model", seeds=[0], epochs=1))
    assert "drawn from each seed: classifier.weight, classifier.bias\n" in capsys.readouterr().out


@pytest.mark.parametrize("keep", ["best", "none"])
def test_which_weights_are_kept(task, capsys, keep):
    main(arguments(task, seeds=[0], epochs=2, **{"keep-weights": keep}))
    (task / "new.tsv").write_text("sentence\nthe red box\n", encoding="utf-8")
    assert (task / "run/seed_0/model").is_dir() == (keep == "best")
    if keep == "none":
        with pytest.raises(ValueError, match="no seed has kept its weights; .*--keep-weights last"):
            predict(task / "run", task / "new.tsv")
    else:
        assert table(predict(task / "run", task / "new.tsv") / "predictions.tsv")[0]["prediction"] in ("red", "green")


def test_zero_3_keeps_its_weights(task, capsys):
    (task / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}), encoding="utf-8")
    main(arguments(task, seeds=[0], epochs=1, deepspeed_config=task / "ds.json"))
    found = table(predict(task / "run", task / "dev.tsv") / "predictions.tsv")
    dev = table(task / "run/seed_0/predictions.tsv")
    assert [row["p(red)"] for row in found] == [row["p(red)"] for row in dev]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--run", "nowhere"], "nowhere has no run.json; name the --output folder of a finished fine-tuning run"),
        (["--seeds", "7"], "--seeds 7: .* has the weights of seed 0; name one of them"),
        (["--file", "no.tsv"], "no.tsv does not exist"),
        (["--file", "bad.tsv"], r"bad.tsv:2: column 'sentence' is missing"),
    ],
)
def test_bad_input_is_refused(task, capsys, more, message):
    main(arguments(task, seeds=[0], epochs=1))
    (task / "new.tsv").write_text("sentence\nthe red box\n", encoding="utf-8")
    (task / "bad.tsv").write_text("text\nthe red box\n", encoding="utf-8")
    more = [str(task / value) if value.endswith(("tsv", "nowhere")) else value for value in more]
    command = ["--run", str(task / "run"), "--file", str(task / "new.tsv"), *more]
    with pytest.raises(SystemExit) as exit_info:
        run_cli(predict_main, command)
    assert exit_info.value.code == 2
    with pytest.raises(ValueError, match=message):
        predict_main(command)
    assert not (task / "run/predictions").exists()


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_the_benchmarks_own_files(tmp_path, name):
    """Header, labels and numbers as the benchmark asks, and a word on the number of rows."""
    glue = text_task(GLUE_TASKS[name])
    predictions = np.array([[5.25], [-1.0], [2.0]]) if name == "sts-b" else np.eye(glue.num_outputs)[[1, 0, 1]]
    expected = {"sts-b": ["5.000", "0.000", "2.000"]}.get(
        name, [glue.labels[i] for i in (1, 0, 1)] if glue.labels else []
    )
    stems = MNLI_SUBMISSIONS if name.startswith("mnli") else ["test"]
    for stem in stems:
        file, num_rows = MNLI_SUBMISSIONS[stem] if name.startswith("mnli") else SUBMISSIONS[name]
        note = write_submission(tmp_path, glue, stem, predictions)
        assert note == f"{file}.tsv has 3 rows; the benchmark takes {num_rows:,}: this is not its test set"
        written = (tmp_path / f"{file}.tsv").read_text(encoding="utf-8").split("\n")
        assert written == ["index\tprediction", *(f"{i}\t{answer}" for i, answer in enumerate(expected)), ""]
    full = write_submission(tmp_path, glue, stem, np.repeat(predictions[:1], num_rows, axis=0))
    assert full == f"{file}.tsv is in the benchmark's format and has its {num_rows:,} rows"


def test_settings_make_the_same_task_again():
    for form in GLUE_TASKS.values():
        settings = json.loads(json.dumps(text_task(form).settings))
        assert restore_task(settings, {}).settings == text_task(form).settings
