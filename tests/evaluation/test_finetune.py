"""The command as a user runs it, on a task of a few rows and a model of a few weights."""

import json

import pytest
import torch
import transformers

from data_prep.cli import run_cli
from data_prep.vocab import train_sentencepiece
from evaluation.finetune import main

WORDS = ["red", "green", "box", "hat", "the", "is", "here"]
MODEL = {
    **{"vocab_size": 12, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    **{"max_position_embeddings": 16, "initializer_range": 0.2},
}


@pytest.fixture
def task(tmp_path):
    """A folder with a task that one word decides, a vocabulary and a model; the arguments that name them."""
    rows = [f"the {WORDS[i % 2]} {WORDS[2 + i // 2 % 2]} is here\t{WORDS[i % 2]}\n" for i in range(160)]
    for name, part in (("train.tsv", rows), ("dev.tsv", rows[:8])):
        (tmp_path / name).write_text("sentence\tlabel\n" + "".join(part), encoding="utf-8")
    vocab = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n"
    (tmp_path / "vocab.txt").write_text(vocab, encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    return tmp_path


def arguments(folder, output="run", checkpoint="random", **changes):
    """The command line of a short run with `changes`; None leaves a flag out."""
    flags = {"task": "classification", "checkpoint": checkpoint, "data-dir": folder, "output": folder / output,
             "epochs": 3, "batch-size": 8, "learning-rate": 0.005, "seq-length": 16, "seeds": [0, 1],
             "model": folder / "config.json", "vocab": folder / "vocab.txt"}  # fmt: skip
    if checkpoint != "random":
        flags |= {"model": None, "vocab": None}
    line = []
    for name, value in (flags | changes).items():
        values = value if isinstance(value, list) else [value]
        line += [] if value is None else [f"--{name}", *map(str, values)]
    return line


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_learns_and_keeps_finished_seeds(task, capsys):
    main(arguments(task))
    printed = capsys.readouterr().out
    assert "mean ± std" in printed and "accuracy, last" in printed
    results = read(task / "run/results.json")
    assert (results["task"], results["start"], results["num_dev"]) == ("classification", "random", 8)
    assert results["last"]["accuracy"]["mean"] == 1.0
    assert [row["seed"] for row in results["seeds"]] == [0, 1]
    assert [epoch["step"] for epoch in results["seeds"][0]["epochs"]] == [20, 40, 60]
    rows = [json.loads(line) for line in (task / "run/seed_0/metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == (["train"] * 20 + ["eval"]) * 3
    assert rows[0]["loss"] > 3 * rows[-2]["loss"]
    lines = (task / "run/seed_1/predictions.tsv").read_text().splitlines()
    assert lines[0] == "index\tlabel\tprediction\tp(green)\tp(red)"
    assert lines[1].startswith("0\tred\tred\t0.0")

    # A seed lost to a kill is run again to the same end, the other one is kept, a further one is added.
    kept = (task / "run/seed_0/finished.json").stat().st_mtime_ns
    losses = [epoch["train_loss"] for epoch in results["seeds"][1]["epochs"]]
    (task / "run/seed_1/finished.json").unlink()
    main(arguments(task, seeds=[0, 1, 2]))
    assert "already finished: seed 0" in capsys.readouterr().out
    assert (task / "run/seed_0/finished.json").stat().st_mtime_ns == kept
    again = read(task / "run/results.json")
    assert [row["seed"] for row in again["seeds"]] == [0, 1, 2]
    assert [epoch["train_loss"] for epoch in again["seeds"][1]["epochs"]] == losses

    with pytest.raises(ValueError, match=r"holds another run \(epochs: 3 there, 4 requested\)"):
        main(arguments(task, epochs=4))
    # Finished seeds have the weights that were asked for, or the folder is another run's.
    with pytest.raises(ValueError, match=r"holds another run \(keep_weights: 'last' there, 'best' requested\)"):
        main([*arguments(task), "--keep-weights", "best"])


def test_seeds_given_twice_are_all_run(task, capsys):
    main([*arguments(task, "majority", "majority", seeds=[0]), "--seeds", "1"])
    assert [row["seed"] for row in read(task / "majority/results.json")["seeds"]] == [0, 1]


def test_baselines_write_the_same_format(task, capsys, monkeypatch):
    """In a batch job too: they read none of the launcher's variables."""
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "3")
    main(arguments(task, "majority", "majority", seeds=[0]))
    main(arguments(task, "ngram", "ngram"))
    assert read(task / "majority/results.json")["last"]["accuracy"]["mean"] == 0.5
    results = read(task / "ngram/results.json")
    assert (results["start"], results["best"]["accuracy"]["mean"]) == ("ngram", 1.0)
    assert len((task / "ngram/seed_1/predictions.tsv").read_text().splitlines()) == 9


@pytest.mark.parametrize("architecture", [transformers.BertModel, transformers.BertForPreTraining])
def test_from_a_hugging_face_folder(task, architecture, capsys):
    config = transformers.BertConfig(**MODEL)
    architecture(config).save_pretrained(task / "hf")
    (task / "hf/vocab.txt").write_bytes((task / "vocab.txt").read_bytes())
    main(arguments(task, checkpoint=task / "hf", seeds=[0], epochs=1))
    assert "drawn from each seed: classifier.weight, classifier.bias\n" in capsys.readouterr().out
    assert read(task / "run/results.json")["start"] == "pretrained"
    # Other weights under the same name are another start, for a finished run as well.
    again = architecture(config)
    again.save_pretrained(task / "hf")
    with pytest.raises(ValueError, match=r"holds another run \(weights\.model\.safetensors: '\w{64}' there"):
        main(arguments(task, checkpoint=task / "hf", seeds=[0], epochs=1))
    with pytest.raises(ValueError, match="is not the vocabulary of"):
        (task / "vocab.txt").write_text((task / "vocab.txt").read_text().replace("hat", "cap"))
        main(arguments(task, "other", task / "hf", vocab=task / "vocab.txt"))


def test_a_loss_that_is_not_finite_ends_the_run(task, capsys):
    model = transformers.BertModel(transformers.BertConfig(**MODEL))
    torch.nn.init.constant_(model.embeddings.LayerNorm.weight, 3e38)  # finite, but its products are not
    model.save_pretrained(task / "hf")
    (task / "hf/vocab.txt").write_bytes((task / "vocab.txt").read_bytes())
    with pytest.raises(SystemExit) as exit_info:
        main(arguments(task, checkpoint=task / "hf", seeds=[0]))
    assert exit_info.value.code == 1
    assert "error: seed 0, step 1: the loss is nan; lower --learning-rate\n" in capsys.readouterr().err
    assert not (task / "run/seed_0/finished.json").exists()


def test_a_part_of_the_training_set_has_every_label_and_is_printed(task, capsys):
    """A file sorted by label, and a folder a label: their first N examples have one label."""
    rows = (task / "train.tsv").read_text(encoding="utf-8").splitlines()
    (task / "sorted.tsv").write_text(
        "\n".join([rows[0], *sorted(rows[1:], key=lambda row: row[-3:])]), encoding="utf-8"
    )
    for i, row in enumerate(rows[1:]):
        text, label = row.split("\t")
        (task / "texts" / label).mkdir(parents=True, exist_ok=True)
        (task / "texts" / label / f"{i}.txt").write_text(text, encoding="utf-8")
    for train_file in ("sorted.tsv", "texts"):
        flags = {"seeds": [0], "train-file": train_file, "max-train-examples": 20}
        main(arguments(task, f"from_{train_file}", "ngram", **flags))
        draw = "20 of 160 training examples, drawn by chance by label: 10 green, 10 red"
        assert capsys.readouterr().out.startswith(draw)
        assert read(task / f"from_{train_file}/run.json")["draw"] == draw
        assert read(task / f"from_{train_file}/results.json")["last"]["accuracy"]["mean"] == 1.0


def test_a_vocabulary_that_cannot_be_exported_is_refused_before_the_training(task):
    text = [" ".join(WORDS)] * 9
    (task / "spm.model").write_bytes(train_sentencepiece(text, 30, "bpe"))
    with pytest.raises(ValueError, match="only unigram models convert.*--keep-weights none"):
        main(arguments(task, model="tiny", vocab=task / "spm.model"))
    assert not (task / "run").exists()


def test_regression(task, capsys):
    rows = "".join(f"the {WORDS[i % 2]} box\t{i % 2 + i / 100}\n" for i in range(16))
    (task / "scores.tsv").write_text("sentence\tlabel\n" + rows, encoding="utf-8")
    files = {"train-file": "scores.tsv", "dev-file": "scores.tsv"}
    main(arguments(task, task="regression", seeds=[0], epochs=8, **files))
    results = read(task / "run/results.json")
    assert results["metrics"] == ["pearson", "spearman"]
    assert results["best"]["pearson"]["mean"] > 0.9


def test_a_seed_stops_without_progress(task, capsys):
    main(arguments(task, seeds=[0], epochs=9, patience=2))
    (seed,) = read(task / "run/results.json")["seeds"]
    assert len(seed["epochs"]) == seed["best_epoch"] + 2 < 9
    assert seed["epochs"][seed["best_epoch"] - 1]["scores"]["accuracy"] == 1.0


def test_squad(task, capsys):
    for version, name in ((1, "train-v1.1.json"), (2, "train-v2.0.json")):
        entries = []
        for i in range(96):
            impossible = version == 2 and i % 3 == 0
            answers = [] if impossible else [{"text": WORDS[i % 2], "answer_start": 4}]
            qa = {"id": str(i), "question": "box" if impossible else "hat", "answers": answers}
            context = f"the {WORDS[i % 2]} {WORDS[2 + i // 2 % 2]} is here"
            entries.append({"context": context, "qas": [qa | ({"is_impossible": True} if impossible else {})]})
        (task / name).write_text(json.dumps({"data": [{"paragraphs": entries}]}), encoding="utf-8")
        flags = {"dev-file": name, "seeds": [0], "epochs": 4, "max-query-length": 4}
        main(arguments(task, f"squad{version}", task=f"squad{version}", **flags))
    printed = capsys.readouterr().out
    assert "96 questions in 96 windows" in printed and "NoAns_f1" in printed and "null_threshold" in printed
    for version in (1, 2):
        assert read(task / f"squad{version}/results.json")["last"]["f1"]["mean"] == 1.0
        predictions = read(task / f"squad{version}/seed_0/predictions.json")
        assert (predictions["1"], predictions["0"]) == ("green", "red" if version == 1 else "")


def test_ranking(task, capsys):
    rows = "".join(f"box {i // 2}\tthe {WORDS[i % 2]} hat\t{i % 2}\n" for i in range(96)) + "hat\tthe red hat\t0\n"
    (task / "pairs.tsv").write_text("question\tsentence\tlabel\n" + rows, encoding="utf-8")
    main(arguments(task, task="ranking", seeds=[0], **{"train-file": "pairs.tsv", "dev-file": "pairs.tsv"}))
    assert "49 questions, 1 without a right and 0 without a wrong answer" in capsys.readouterr().out
    results = read(task / "run/results.json")
    assert (results["metrics"], results["best"]["map"]["mean"], results["best"]["mrr"]["mean"]) == (
        ["map", "mrr"],
        1.0,
        1.0,
    )


def test_named_entities(task, capsys):
    rows = [f"the O\n{WORDS[i % 2]} S-{'X' if i % 2 else 'Y'}\nbox O\nis O\nhere O\n\n" for i in range(80)]
    (task / "train.txt").write_text("".join(rows), encoding="utf-8")
    main(arguments(task, task="ner", seeds=[0], **{"dev-file": "train.txt", "seq-length": 5}))
    printed = capsys.readouterr().out
    assert "80 sentences in 160 windows" in printed and "X f1" in printed and "Y recall" in printed
    # The rate falls over all windows, not over the sentences.
    steps = [json.loads(line) for line in (task / "run/seed_0/metrics.jsonl").read_text().splitlines()]
    rates = [row["learning_rate"] for row in steps if row["kind"] == "train"]
    assert len(rates) == 60 and rates[-1] == pytest.approx(0.005 / 60)
    results = read(task / "run/results.json")
    assert results["last"]["f1"]["mean"] == results["seeds"][0]["epochs"][-1]["scores"]["X f1"] == 1.0
    assert (task / "run/seed_0/predictions.txt").read_text().startswith("the\tO\tO\t")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "rtee"}, r"--task rtee is unknown; choose one of cola, .*did you mean 'rte'\?"),
        ({"data-dir": "nowhere"}, r"--data-dir nowhere: no such folder"),
        ({"dev-file": "no.tsv"}, r"no.tsv does not exist; the folder holds dev.tsv, train.tsv"),
        ({"checkpoint": "nowhere", "model": "tiny"}, r"--model .* goes with --checkpoint random; nowhere has its own"),
        ({"checkpoint": "nowhere"}, r"--checkpoint nowhere: no such folder; name a pretraining run"),
        ({"model": None}, r"--checkpoint random needs --model"),
        ({"model": "tinny"}, r"did you mean 'tiny'"),
        ({"seq-length": 17}, r"--seq-length 17: the model has 16 positions; choose at most that"),
        ({"patience": 0}, r"argument --patience: 0 is below 1"),
        ({"epochs": 0}, r"argument --epochs: 0 is below 1"),
        ({"seeds": [1, 1]}, r"--seeds 1 1: give each value once"),
        ({"tag-scheme": "iob1"}, r"--tag-scheme goes with --task ner; leave it out"),
        (
            {"task": "squad1", "checkpoint": "ngram"},
            r"--checkpoint ngram predicts one label or score per",
        ),
        ({"doc-stride": 4}, r"--doc-stride goes with --task squad1 or squad2; leave it out"),
        ({"learning-rate": 5}, r"argument --learning-rate: 5 is not below 1"),
        ({"rescale-embeddings": []}, r"--rescale-embeddings goes with a pretrained --checkpoint; leave it out"),
        ({"dropout": 1.5}, r"hidden_dropout_prob=1.5 must be a number from 0 to 1, but not 1"),
        ({"warmup-proportion": 2}, r"argument --warmup-proportion: 2 is not between 0 and 1"),
        ({"deepspeed_config": "no.json"}, r"no.json: no such file"),
        ({"set": "zero_optimization.stage=4"}, r"--set: zero_optimization.stage=4 must be one of 0, 1, 2, 3"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(task, capsys, changes, message):
    with pytest.raises(SystemExit) as exit_info:
        run_cli(main, arguments(task, **changes))
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not (task / "run").exists()
    with pytest.raises(ValueError, match=message):
        main(arguments(task, **changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 4}, "'train_batch_size' is set by a flag of this command"),
        ({"bf17": {}}, "did you mean 'bf16'"),
        ({"bf16": {"enabled": True}}, "16-bit training is not supported at zero_optimization.stage=0.*choose stage 1"),
        pytest.param(
            {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}},
            "needs a GPU, but none is available",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_a_deepspeed_file_holds_precision_and_zero_only(task, content, message):
    (task / "ds.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        main(arguments(task, deepspeed_config=task / "ds.json"))
    assert not (task / "run").exists()


def test_bf16_with_zero(task, capsys):
    """Precision from the file, ZeRO's stage from --set."""
    (task / "ds.json").write_text(json.dumps({"bf16": {"enabled": True}}))
    main(arguments(task, seeds=[0], **{"deepspeed-config": task / "ds.json", "set": "zero_optimization.stage=1"}))
    assert read(task / "run/run.json")["deepspeed_config"]["zero_optimization"] == {"stage": 1}
    assert read(task / "run/results.json")["last"]["accuracy"]["mean"] == 1.0
