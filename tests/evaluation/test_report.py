"""The report over small run folders: which folder is what, the tables, and a page that stands alone."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from evaluation.report import main
from evaluation.report_page.published import COLUMNS, PUBLISHED
from evaluation.report_page.tables import detail_scores, overview, score_table, short_names, task_groups, verdicts
from evaluation.run_folder import confusion_matrix
from evaluation.tasks.glue import GLUE_TASKS
from pretrain.model_config import ModelConfig
from pretrain.parameter_table import num_parameters

ROOT = Path(__file__).parents[2]
CONFIG = ModelConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40)
SPEEDS = {"samples_per_s": 100.0, "tokens_per_s": 5000.0, "mfu": 0.25, "memory_gib": 1.5}
FAST = {"step": 30, "mlm_loss": 5.5, "learning_rate": 0.01, "grad_norm": 2.5, **SPEEDS}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def results(start, *scores, **changes):
    """A results.json of one metric: for each seed the scores after each epoch."""
    seeds = [
        {
            "seed": seed,
            "best_epoch": 1 + values.index(max(values)),
            "epochs": [{"epoch": 1 + i, "scores": {"accuracy": value}} for i, value in enumerate(values)],
        }
        for seed, values in enumerate(scores)
    ]
    last = [values[-1] for values in scores]
    summary = {"mean": sum(last) / len(last), "median": sorted(last)[len(last) // 2], "std": 0.0, "min": min(last)}
    both = {which: {"accuracy": {**summary, "max": max(last)}} for which in ("last", "best")}
    head = {"task": "rte", "start": start, "checkpoint": start, "metrics": ["accuracy"], "data": "glue/RTE"}
    head |= {"train_sha256": "t", "dev_sha256": "d", "num_train": 2490, "num_dev": 277}
    return {**head, **both, "seeds": seeds} | changes


def optimizer_of(rate):
    return {"optimizer": {"type": "Lamb", "params": {"lr": rate}}}


@pytest.fixture
def runs(tmp_path):
    """One folder of each kind."""
    ratios = {"trust_ratio_min": 0.1, "trust_ratio_median": 0.2, "trust_ratio_max": 1.0}
    rows = [
        {
            "kind": "train",
            "step": step,
            "mlm_loss": 8 - step / 10,
            "learning_rate": 1e-3,
            "grad_norm": 1.0,
            **SPEEDS,
            **ratios,
        }
        for step in (10, 20)
    ]
    rows.append({"kind": "eval", "step": 20, "mlm_loss": 6.1, "mlm_accuracy": 0.07, "unigram_entropy": 6.75})
    write(tmp_path / "pretrain/metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path / "pretrain/run.json", {"note": "a < b", "deepspeed": optimizer_of(0.005)})
    write(tmp_path / "pretrain/config.json", CONFIG.to_json())
    write(tmp_path / "pretrain/deepspeed_config.json", {"train_batch_size": 32, **optimizer_of(0.005)})
    write(tmp_path / "ft/pretrained/results.json", results("pretrained", [0.6, 0.7], [0.5, 0.65]))
    for seed, answers in enumerate(("yes no no", "yes yes no")):
        lines = [f"{i}\tyes\t{answer}\t0.5\t0.5" for i, answer in enumerate(answers.split())]
        lines += ["3\tno\tno\t0.5\t0.5"]
        header = "index\tlabel\tprediction\tp(yes)\tp(no)"
        write(tmp_path / f"ft/pretrained/seed_{seed}/predictions.tsv", "\n".join([header, *lines]) + "\n")
    write(tmp_path / "ft/majority/results.json", results("majority", [0.53], [0.53]))
    for start in ("pretrained", "majority"):
        write(tmp_path / f"ft/{start}/run.json", {"train": {"file": "train.tsv", "sha256": "t"}})
    manifest = {"format": "bert-masked-shards", "config": {"seq_length": 128}, "vocab": {"size": 50}}
    write(
        tmp_path / "shards/manifest.json", {**manifest, "num_sequences": 1234, "num_tokens": 99, "num_predictions": 7}
    )
    return [tmp_path / name for name in ("pretrain", "ft/pretrained", "ft/majority", "shards")]


def test_the_tables_are_printed_and_written(runs, tmp_path, capsys):
    main([*map(str, runs), "--output", str(tmp_path / "out/report.html"), "--title", "A < B"])
    printed = " ".join(capsys.readouterr().out.split())
    markdown = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "rte accuracy pretrained 67.5 ± 0.0 70.0 70.0 65.0" in printed
    assert "rte, accuracy: pretrained is 14.5 points above majority; no seed of one reaches the other." in printed
    for fact in (
        "unigram entropy 6.750",
        "below it, nat 0.650",
        "sequences seen 640",
        "tokens seen 0.0 M",
        "MFU 25.0%",
    ):
        assert fact in printed
    assert re.search(r"\| shards +\| masked shards +\|", markdown)
    assert all(headline in page for headline in ("<h1>A &lt; B</h1>", "<h2>Scores</h2>", "<h2>Pretraining</h2>"))
    assert '"a &lt; b"' in page.replace("&quot;", '"')
    assert page.count('src="data:image/svg+xml;base64,') == page.count("<img") == 9
    # Scores are the first numbers of the page; a confusion matrix is text, in letters of the page's size.
    assert page.index("67.5 ± 0.0") < page.index("held-out MLM loss") < page.index("tokens seen")
    rows = re.findall(r"<tr><th>(yes|no)</th><td[^>]*>(\d+)</td><td[^>]*>(\d+)</td></tr>", page)
    assert rows == [("yes", "50", "50"), ("no", "0", "100")]


def test_pretraining_runs_are_compared(runs, tmp_path, capsys):
    """Their curves share figures, their last values a table, and the settings that differ are listed."""
    other = tmp_path / "fast <b>"
    shutil.copytree(runs[0], other)
    write(other / "run.json", {"note": "a < b", "deepspeed": optimizer_of(0.5), "new": True})
    with open(other / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "train", **FAST}) + '\n{"cut')
    main([str(runs[0]), str(other), "--output", str(tmp_path / "report.html")])
    printed, page = capsys.readouterr().out, (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 7 and "<b>" not in page.split("</style>")[1].replace('"tile"><b>', "")
    cells = [line.split() for line in printed.splitlines()]
    assert ["steps", "20", "30"] in cells and ["gradient", "norm", "1", "2.5"] in cells
    differing = [row for row in cells if row and row[0] in ("note", "new", "deepspeed.optimizer.params.lr")]
    assert differing == [["deepspeed.optimizer.params.lr", "0.005", "0.5"], ["new", "true"]]
    main([str(runs[0]), "--output", str(tmp_path / "report.html")])
    assert "Settings that differ" not in capsys.readouterr().out


def test_the_page_refers_to_nothing_outside(runs, tmp_path, capsys):
    main([*map(str, runs), "--output", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|url\(|@import", page)


def test_a_report_replaces_a_report_and_no_other_file(runs, tmp_path, capsys):
    command = [str(runs[1]), "--output", str(tmp_path / "report.html")]
    main(command)
    main(command)
    (tmp_path / "report.md").write_text("my notes", encoding="utf-8")
    with pytest.raises(ValueError, match="report.md exists and is not a report"):
        main(command)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("nothing", "nothing has no results of a fine-tuning"),
        ("started", "no step of a pretraining"),
        ("vocab", "not a corpus or shards"),
    ],
)
def test_a_folder_without_results_is_refused(tmp_path, folder, message):
    write(tmp_path / "nothing/notes.txt", "")
    write(tmp_path / "started/metrics.jsonl", "")
    write(tmp_path / "vocab/manifest.json", {"vocab": {}})
    with pytest.raises(ValueError, match=message):
        main([str(tmp_path / folder), "--output", str(tmp_path / "report.html")])
    assert not (tmp_path / "report.html").exists()


def test_names_and_endings(tmp_path):
    folders = [tmp_path / name for name in ("pretrain", "shards/train", "shards/heldout")]
    assert short_names(folders) == ["pretrain", "shards/train", "shards/heldout"]
    assert short_names(folders[1:2]) == ["train"]
    with pytest.raises(ValueError, match="is named twice"):
        short_names([tmp_path, tmp_path / "x/.."])
    with pytest.raises(ValueError, match="ends in .html"):
        main([str(tmp_path), "--output", "report.pdf"])


def test_only_runs_on_the_same_examples_compare():
    """Whatever else is the same, another task, training set, number of its examples or dev set is another group."""
    changes = {
        "rte (glue/RTE)": {},
        "rte (small)": {"data": "small", "train_sha256": "s"},
        "rte (glue/RTE, 160 training examples)": {"num_train": 160},
        "rte (glue/RTE, 2,490 training examples, training set u)": {"train_sha256": "u"},
        "wnli": {"task": "wnli"},
    }
    runs = {title: results("pretrained", [0.9], **change) for title, change in changes.items()}
    groups = task_groups(runs | {"baseline": results("majority", [0.5])})
    assert {title: [run["start"] for run in group] for title, group in groups.items()} == {
        "rte (glue/RTE, 2,490 training examples, training set t)": ["pretrained", "majority"],
        **{title: ["pretrained"] for title in list(changes)[1:]},
    }
    assert len(verdicts(groups)) == 1


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ([0.1, 0.2], [0.15, 0.15], "level with majority; their seeds overlap"),
        ([0.1 + 0.2], [0.3], "level with majority; their seeds overlap"),  # the sum is 0.30000000000000004
        ([0.5004], [0.5], "less than 0.1 points above majority; no seed of one reaches the other"),
        ([0.4996], [0.5], "less than 0.1 points below majority; no seed of one reaches the other"),
        ([0.501], [0.5], "0.1 points above majority; no seed of one reaches the other"),
    ],
)
def test_how_far_apart_two_means_are(ours, theirs, words):
    runs = {"a": results("pretrained", *([x] for x in ours)), "b": results("majority", *([x] for x in theirs))}
    assert verdicts(task_groups(runs)) == [f"rte, accuracy: pretrained is {words}."]


def test_models_of_two_sizes_are_mentioned():
    sizes = [{"model": {"num_hidden_layers": 4, "hidden_size": size}} for size in (256, 512)]
    runs = {"a": results("pretrained", [0.5], **sizes[0]), "b": results("random", [0.4], **sizes[1])}
    assert verdicts(task_groups(runs))[0].endswith("; no seed of one reaches the other; their models differ in size.")


def test_only_runs_with_the_same_dev_file_compare():
    runs = {
        "a": results("random", [0.5]),
        "b": results("pretrained", [0.5], [0.4]),
        "c": results("pretrained", [0.9], dev_sha256="e"),
        "d": results("random", [0.6]),
    }
    groups = task_groups(runs)
    assert [[run["label"] for run in group] for group in groups.values()] == [
        ["pretrained", "random (a)", "random (d)"],
        ["pretrained"],
    ]
    sentences = verdicts(groups)
    assert [sentence.split(": ")[1] for sentence in sentences] == [
        "pretrained is 5.0 points below random (a); their seeds overlap.",
        "pretrained is 15.0 points below random (d); no seed of one reaches the other.",
    ]


def test_scores_by_type_have_a_table_of_their_own():
    runs = {"a": results("random", [0.5]), "b": results("pretrained", [0.5], [0.7])}
    for run, values in (("a", [0.25]), ("b", [0.5, 0.7])):
        for seed, value in zip(runs[run]["seeds"], values, strict=True):
            seed["epochs"][-1]["scores"] |= {"PER f1": value, "null_threshold": -3.0}
    (group,) = task_groups(runs).values()
    table = detail_scores(group)
    assert table.headers == ("score", "pretrained", "random")
    assert table.rows == [["PER f1", "60.0 ± 14.1", "25.0 ± 0.0"]]
    assert detail_scores([results("random", [0.5]) | {"label": "random"}]).rows == []


def test_what_was_published_for_that_size_stands_beside():
    mini = {"model": {"num_hidden_layers": 4, "hidden_size": 256}}
    groups = task_groups({"a": results("random", [0.5]) | mini, "b": results("pretrained", [0.6]) | mini})
    assert score_table(groups).rows[-1][:4] == ["rte", "accuracy", "published: BERT-Mini, GLUE test", "57.9"]
    table = overview(groups)
    assert table.headers == ("task", "metric", "pretrained", "random", "published")
    assert table.rows == [["rte", "accuracy", "60.0 ± 0.0", "50.0 ± 0.0", "57.9 (BERT-Mini, GLUE test)"]]
    other = {"model": {"num_hidden_layers": 3, "hidden_size": 256}}
    assert overview(task_groups({"a": results("random", [0.5]) | other})).rows[0][-1] == ""
    known = {**{name: task.metrics for name, task in GLUE_TASKS.items()}, "squad1": ("f1", "exact")}
    known |= {"squad2": ("f1", "exact"), "ner": ("f1", "precision", "recall")}
    assert all(metric in known[task] for task, metric in COLUMNS) and len(set(COLUMNS)) == len(COLUMNS)
    for _, scores in PUBLISHED.values():
        assert len(scores) in (13, len(COLUMNS)) and all(value is None or 0 <= value <= 100 for value in scores)


def test_a_confusion_matrix_counts_all_seeds(runs):
    assert confusion_matrix(runs[1]) == {"labels": ["yes", "no"], "counts": [[3, 3], [0, 2]]}
    assert confusion_matrix(runs[2]) is None  # it kept no predictions


def test_parameters_are_those_of_hugging_face():
    model = transformers.BertForPreTraining(transformers.BertConfig(**CONFIG.to_json()))
    assert num_parameters(CONFIG) == model.num_parameters()


def test_a_report_needs_no_engine():
    program = "import evaluation.report, sys; print(sorted({'torch', 'deepspeed', 'megatron'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
