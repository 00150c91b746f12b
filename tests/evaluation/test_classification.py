"""Tasks on one's own files: columns, classes and scores, and a message with file and line for everything wrong."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch

from evaluation.tasks.classification import (
    Example,
    TextTask,
    decode_texts,
    draw_examples,
    own_task,
    read_examples,
    text_task,
    write_texts,
)
from evaluation.tasks.rows import read_rows

PAIRS = "sentence1\tsentence2\tlabel\na b\tc\tyes\nd\te f\tno\n"


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_pairs_take_their_classes_from_the_training_file(tmp_path):
    write(tmp_path, "train.tsv", PAIRS)
    write(tmp_path, "dev.tsv", PAIRS)
    task = own_task("classification", tmp_path)
    assert (task.labels, task.metrics, task.text_columns) == (
        ("no", "yes"),
        ("accuracy", "macro_f1"),
        ("sentence1", "sentence2"),
    )
    assert read_examples(tmp_path / "train.tsv", task) == [Example("a b", "c", 1), Example("d", "e f", 0)]


def test_whole_number_classes_are_in_numerical_order(tmp_path):
    write(tmp_path, "train.csv", "sentence,label\na,10\nb,9\nc,-1\n")
    write(tmp_path, "dev.csv", "sentence,label\na,10\n")
    task = own_task("classification", tmp_path)
    assert task.labels == ("-1", "9", "10")
    assert task.metrics == ("accuracy", "macro_f1")


def test_classes_that_are_equal_as_numbers_are_in_alphabetical_order(tmp_path):
    """The order of a set of strings would differ from process to process."""
    ones = ["0" * number + "1" for number in range(12)]
    write(tmp_path, "train.csv", "sentence,label\n" + "".join(f"a,{label}\n" for label in ["2", *ones, "-1"]))
    assert own_task("classification", tmp_path, dev_file="train.csv").labels == ("-1", *sorted(ones), "2")


def test_the_three_formats_give_the_same_examples(tmp_path):
    files = [
        write(tmp_path, "a.tsv", 'sentence\tlabel\nsay "hi", you\t1\n'),
        write(tmp_path, "a.csv", 'label,sentence\n1,"say ""hi"", you"\n'),
        write(tmp_path, "a.jsonl", '{"sentence": "say \\"hi\\", you", "label": 1, "more": null}\n'),
    ]
    write(tmp_path, "train.tsv", "sentence\tlabel\na\t0\nb\t1\n")
    task = own_task("classification", tmp_path, "train.tsv", "a.tsv")
    assert [read_examples(file, task) for file in files] == [[Example('say "hi", you', None, 1)]] * 3


def test_one_folder_of_texts_per_label(tmp_path):
    """The layout of IMDb: train/pos/0_9.txt."""
    for split in ("train", "test"):
        for label in ("pos", "neg", "unsup"):
            (tmp_path / split / label).mkdir(parents=True)
            write(tmp_path / split / label, "0_1.txt", f"a {label} film<br />\nof {split}")
    write(tmp_path / "train/neg", "1_1.txt", "\ufeffbad")
    task = own_task("classification", tmp_path, dev_file="test")
    assert (task.labels, task.train_file) == (("neg", "pos"), "train")
    assert read_examples(tmp_path / "train", task) == [
        Example("a neg film<br />\nof train", None, 0),
        Example("bad", None, 0),
        Example("a pos film<br />\nof train", None, 1),
    ]
    write(tmp_path / "train/neg", "2_1.txt", b"\xe9")
    with pytest.raises(ValueError, match=r"train/neg/2_1.txt:1: byte 0xe9 is not UTF-8"):
        read_examples(tmp_path / "train", task)


def test_regression_reads_numbers(tmp_path):
    write(tmp_path, "train.jsonl", '{"sentence1": "a", "sentence2": "b", "label": 2.5}\n')
    task = own_task("regression", tmp_path, dev_file="train.jsonl")
    assert text_task(task).num_outputs == 1
    assert read_examples(tmp_path / "train.jsonl", task) == [Example("a", "b", 2.5)]


def test_a_file_without_labels_is_read_as_such(tmp_path):
    write(tmp_path, "train.tsv", PAIRS)
    write(tmp_path, "new.tsv", "sentence1\tsentence2\na\tb\n")
    task = own_task("classification", tmp_path, dev_file="train.tsv")
    assert read_examples(tmp_path / "new.tsv", task, labelled=False) == [Example("a", "b", None)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "dev.tsv",
            "sentence1\tlabel\na\tyes\n",
            r"dev.tsv:2: column 'sentence2' is missing; .* the file has sentence1, label",
        ),
        (
            "dev.tsv",
            "sentence1\tsentence2\tlabel\na\tb\tyes\na\tb\n",
            r"dev.tsv:3: .* 2 fields and the header 3; column 'label' is miss",
        ),
        (
            "dev.tsv",
            "sentence1\tsentence2\tlabel\na\tb\tc\tyes\n",
            r"dev.tsv:2: the row has 4 fields and the header 3; correct",
        ),
        (
            "dev.tsv",
            "sentence1\tsentence2\tlabel\na\tb\tmaybe\n",
            r"dev.tsv:2: label 'maybe' is outside task .* 'no', 'yes'",
        ),
        ("dev.tsv", "", r"dev.tsv holds no row"),
        ("dev.tsv", "sentence1\tsentence2\tlabel\n", r"dev.tsv holds no row"),
        ("dev.tsv", b"sentence1\tsentence2\tlabel\n\xff\tb\tyes\n", r"dev.tsv:2: byte 0xff is not UTF-8"),
        ("dev.csv", 'sentence1,sentence2,label\n"a"b,c,yes\n', r"dev.csv:2: .*quotation marks"),
        ("dev.csv", "sentence1;sentence2;label\nb;c;yes\n", r"dev.csv:1: the columns are separated by ';'"),
        ("dev.tsv", "label\tsentence1\tlabel\n", r"dev.tsv:1: column 'label' occurs 2 times; rename"),
        ("dev.jsonl", '{"sentence1": "a"\n', r"dev.jsonl:1: not valid JSON"),
        ("dev.jsonl", "[1]\n", r"dev.jsonl:1: a JSON list instead of an object"),
        ("dev.xml", "<a/>", r"the ending '.xml' is not one of .tsv"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, message):
    write(tmp_path, "train.tsv", PAIRS)
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        read_examples(path, own_task("classification", tmp_path, "train.tsv", name))


@pytest.mark.parametrize("value", ["high", "nan", "inf"])
def test_a_score_must_be_a_number(tmp_path, value):
    write(tmp_path, "train.tsv", f"sentence\tlabel\na\t1.5\nb\t{value}\n")
    with pytest.raises(ValueError, match=rf"train.tsv:3: '{value}' is not a score"):
        read_examples(tmp_path / "train.tsv", own_task("regression", tmp_path, dev_file="train.tsv"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds none of train.tsv, train.csv, train.jsonl, train/; .*--train-file"),
        ({"train.tsv": PAIRS, "train.csv": "a"}, "holds train.tsv and train.csv; .*--train-file"),
        ({"train.tsv": PAIRS}, "holds none of dev.tsv"),
        ({"train.tsv": "sentence\tlabel\na\tx\n", "dev.tsv": PAIRS}, "every row has the label 'x'; .*at least two"),
        ({"train.tsv": "", "dev.tsv": PAIRS}, "train.tsv holds no rows; give it a header"),
    ],
)
def test_a_folder_that_is_not_a_task(tmp_path, files, message):
    for name, content in files.items():
        write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        own_task("classification", tmp_path)


def test_a_missing_label_column_in_the_training_file_is_named(tmp_path):
    path = write(tmp_path, "train.tsv", "sentence\ttarget\na\tx\n")
    with pytest.raises(ValueError, match=r"train.tsv:2: column 'label' is missing; .* the file has sentence, target"):
        read_examples(path, own_task("classification", tmp_path, dev_file="train.tsv"))


def test_a_row_without_a_label_is_named(tmp_path):
    write(tmp_path, "train.jsonl", '{"sentence": "a", "label": "x"}\n{"sentence": "b"}\n')
    with pytest.raises(ValueError, match=r"train.jsonl:2: column 'label' is missing"):
        read_examples(tmp_path / "train.jsonl", own_task("classification", tmp_path, dev_file="train.jsonl"))


NOT_TEXT = [
    ("null", "null"),
    ("NaN", "NaN"),
    ("-Infinity", "-Infinity"),
    ('["a"]', r'\["a"\]'),
    ('{"a": 1}', '{"a": 1}'),
]


@pytest.mark.parametrize("column", ["sentence", "label"])
@pytest.mark.parametrize(
    ("value", "shown"), [*NOT_TEXT, ('"good \\ud83d"', r"half of a character"), ('"\\uDE00"', "half of")]
)
def test_a_value_that_is_not_a_text_is_refused(tmp_path, column, value, shown):
    """Once null was read as the word "null", a list as the text '["a"]', and half a character broke the tokenizer."""
    rows = [{"sentence": "a", "label": "x"}, {"sentence": "b", "label": "y"}, {"sentence": "c", "label": "x"}]
    content = "".join(f"{json.dumps(row)}\n" for row in rows)
    whole = write(tmp_path, "dev.jsonl", content)
    task = own_task("classification", tmp_path, "dev.jsonl")
    path = write(tmp_path, "train.jsonl", content.replace({"sentence": '"c"', "label": '"y"'}[column], value))
    message = rf"train.jsonl:{3 if column == 'sentence' else 2}: '{column}' (is|has) .*{shown}"
    with pytest.raises(ValueError, match=message):
        own_task("classification", tmp_path)
    with pytest.raises(ValueError, match=message):
        read_examples(path, task)
    if column == "label":  # which predictions ignore, like any other column
        assert read_examples(path, task, labelled=False) == read_examples(whole, task, labelled=False)


def test_numbers_and_truth_values_are_read_as_they_are_written(tmp_path):
    path = write(tmp_path, "train.jsonl", '{"sentence": 5, "label": 1}\n{"sentence": 2.5, "label": true}\n')
    task = own_task("classification", tmp_path, dev_file="train.jsonl")
    assert task.labels == ("1", "true")
    assert [example.text for example in read_examples(path, task)] == ["5", "2.5"]
    path = write(tmp_path, "train.jsonl", "[" * 100_000)
    with pytest.raises(ValueError, match="train.jsonl:1: not valid JSON"):
        list(read_rows(path))


@pytest.mark.parametrize("label", ["", " ", "nan", "NaN", "NULL", "<NA>", "\u200b", "\t\t"])
def test_a_missing_label_is_not_a_class(tmp_path, label):
    write(tmp_path, "train.csv", f'sentence,label\na,pos\nb,neg\nc,"{label}"\n')
    with pytest.raises(ValueError, match=rf"train.csv:4: label {re.escape(ascii(label))} stands for a missing value"):
        own_task("classification", tmp_path, dev_file="train.csv")


@pytest.mark.parametrize(
    ("label", "plain"),
    [
        *(("pos ", "pos"), (" pos", "pos"), ("pos\u00a0", "pos"), ("very  good", "very good"), ("pos\u200b", "pos")),
        *(("\ufeffpos", "pos"), ("po\u00ads", "pos"), ("po\ts", "po s"), ("po\ns", "po s"), ("po\r\ns", "po s")),
        *(("po\u2028s", "po s"), ("pos\x00", "pos"), ("cafe\u0301", "caf\xe9"), ("pos\u200d", "pos")),
    ],
)
def test_a_class_is_what_it_looks_like(tmp_path, label, plain):
    """Else "pos " would be a class beside "pos", and a tab or line break in a label would break predictions.tsv."""
    write(tmp_path, "train.csv", f'sentence,label\na,{plain}\nb,neg\nc,"{label}"\n')
    message = f"train.csv:4: label {ascii(label)} looks like {ascii(plain)} and would be another class"
    with pytest.raises(ValueError, match=re.escape(message)):
        own_task("classification", tmp_path, dev_file="train.csv")


def test_labels_of_other_scripts_are_classes(tmp_path):
    """So are those with a joiner inside a word (Persian) and with vowel signs (Hindi)."""
    labels = [
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\u0905\u092a\u0928\u0947",
        "\U0001f600",
        "None",
        "very good",
    ]
    path = write(tmp_path, "train.csv", "\ufeff sentence , label \n" + "".join(f"a,{label}\n" for label in labels))
    task = own_task("classification", tmp_path, dev_file="train.csv")
    assert task.labels == tuple(sorted(labels))
    write_texts(task, tmp_path, read_examples(path, task), np.eye(5))
    written = (tmp_path / "predictions.tsv").read_text(encoding="utf-8").splitlines()
    assert [row.count("\t") for row in written] == [7] * 6


@pytest.mark.parametrize("value", ["1e39", "-1e39", "1e19", "1e400"])
def test_a_score_must_fit_into_float32(tmp_path, value):
    """So must its square, which is the loss."""
    write(tmp_path, "train.tsv", f"sentence\tlabel\na\t1e18\nb\t{value}\n")
    task = own_task("regression", tmp_path, dev_file="train.tsv")
    with pytest.raises(ValueError, match=rf"train.tsv:3: '{value}' is not a score .* from -1e\+18 to 1e\+18"):
        read_examples(tmp_path / "train.tsv", task)
    assert torch.isfinite(torch.tensor(1e18) ** 2)


def test_a_draw_has_every_label(tmp_path):
    """Of folders by label, or of a sorted file, the first N examples have one label."""
    examples = [Example(str(i), None, 0) for i in range(300)] + [Example(str(i), None, 1) for i in range(100)]
    drawn, note = draw_examples(examples, 40, ("neg", "pos"))
    assert Counter(example.label for example in drawn) == {0: 30, 1: 10}
    assert note == "40 of 400 training examples, drawn by chance by label: 30 neg, 10 pos"
    assert drawn == draw_examples(examples, 40, ("neg", "pos"))[0]
    assert drawn == [example for example in examples if example in drawn]
    assert 50 < np.mean([int(example.text) for example in drawn[30:]]) + 25 < 100  # not the first ones of a label
    rare = [*examples, Example("rare", None, 2)]
    assert {example.label for example in draw_examples(rare, 3, ("neg", "pos", "rare"))[0]} == {0, 1, 2}
    assert draw_examples(rare, 401, ("neg", "pos", "rare")) == (rare, "")
    assert draw_examples(rare, None, ("neg", "pos", "rare")) == (rare, "")
    # Scores and questions have no classes; nor has a sentence of tags.
    scores, note = draw_examples([Example("a", None, i / 100) for i in range(100)], 50, ())
    assert 0.4 < np.mean([example.label for example in scores]) < 0.6
    assert note == "50 of 100 training examples, drawn by chance"
    assert len(draw_examples([("word", "O")] * 9, 4, ("O", "B-X"))[0]) == 4


def test_near_certain_probabilities_differ():
    """In float32 both would be 1, and a ranking by them would have a tie that the model did not make."""
    task = TextTask("ranking", ("question", "sentence"), "label", ("0", "1"), ("map", "mrr"))
    found = decode_texts(task, [], None, [torch.tensor([-10.0, 10.0]), torch.tensor([-10.0, 11.0])])
    assert found[0, 1] < found[1, 1] <= 1
