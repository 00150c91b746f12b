"""One's own files: the three formats, what is odd in real ones, and a message with file and line for everything that is
wrong.
"""

import pytest

from evaluation.classification import Example, own_task, read_examples
from evaluation.rows import read_rows

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


def test_the_three_formats_say_the_same(tmp_path):
    files = [
        write(tmp_path, "a.tsv", 'sentence\tlabel\nsay "hi", you\t1\n'),
        write(tmp_path, "a.csv", 'label,sentence\n1,"say ""hi"", you"\n'),
        write(tmp_path, "a.jsonl", '{"sentence": "say \\"hi\\", you", "label": 1, "more": null}\n'),
    ]
    write(tmp_path, "train.tsv", "sentence\tlabel\na\t0\nb\t1\n")
    task = own_task("classification", tmp_path, "train.tsv", "a.tsv")
    assert [read_examples(file, task) for file in files] == [[Example('say "hi", you', None, 1)]] * 3


def test_byte_order_mark_crlf_blank_lines_and_odd_line_breaks(tmp_path):
    path = write(tmp_path, "a.tsv", '\ufeffsentence\tlabel\r\n" lone quote\x85\u2028here\t1\r\n\r\nb\t0'.encode())
    assert list(read_rows(path)) == [
        (2, {"sentence": '" lone quote\x85\u2028here', "label": "1"}),
        (4, {"sentence": "b", "label": "0"}),
    ]


def test_a_quoted_csv_field_may_hold_line_breaks(tmp_path):
    path = write(tmp_path, "a.csv", '\ufeffsentence,label\r\n"two\r\nlines",1\r\nb,0\r\n')
    assert [row["sentence"] for _, row in read_rows(path)] == ["two\r\nlines", "b"]


def test_the_line_of_a_row_is_where_it_begins(tmp_path):
    path = write(tmp_path, "a.csv", 'sentence,label\n"two\n\nlines",1\n\n,0\n"say ""no"", he\tsaid",1')
    assert [line for line, _ in read_rows(path)] == [2, 6, 7]
    assert list(read_rows(path))[2][1]["sentence"] == 'say "no", he\tsaid'
    write(tmp_path, "a.csv", 'sentence,label\n"two\nlines",1\n"never closed,1\nb,0\n')
    with pytest.raises(ValueError, match=r"a.csv:4: unexpected end of data; correct the quotation marks"):
        list(read_rows(path))
    write(tmp_path, "a.csv", 'sentence,label\nb,0\n"two\nlines",1,2\n')
    with pytest.raises(ValueError, match=r"a.csv:3: the row has 3 fields where 2 are due"):
        list(read_rows(path))


def test_a_folder_of_texts_a_label(tmp_path):
    """The shape of IMDb: train/pos/0_9.txt."""
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
    with pytest.raises(ValueError, match=r"train/neg/2_1.txt:1: byte 0xe9 is no UTF-8"):
        read_examples(tmp_path / "train", task)


def test_regression_reads_numbers(tmp_path):
    write(tmp_path, "train.jsonl", '{"sentence1": "a", "sentence2": "b", "label": 2.5}\n')
    task = own_task("regression", tmp_path, dev_file="train.jsonl")
    assert task.num_outputs == 1
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
            r"dev.tsv:3: .* 2 fields where 3 are due; column 'label' is miss",
        ),
        (
            "dev.tsv",
            "sentence1\tsentence2\tlabel\na\tb\tc\tyes\n",
            r"dev.tsv:2: the row has 4 fields where 3 are due; correct",
        ),
        (
            "dev.tsv",
            "sentence1\tsentence2\tlabel\na\tb\tmaybe\n",
            r"dev.tsv:2: label 'maybe' is outside task .* 'no', 'yes'",
        ),
        ("dev.tsv", "", r"dev.tsv holds no row"),
        ("dev.tsv", "sentence1\tsentence2\tlabel\n", r"dev.tsv holds no row"),
        ("dev.tsv", b"sentence1\tsentence2\tlabel\n\xff\tb\tyes\n", r"dev.tsv:2: byte 0xff is no UTF-8"),
        ("dev.csv", 'sentence1,sentence2,label\n"a"b,c,yes\n', r"dev.csv:2: .*quotation marks"),
        ("dev.csv", "sentence1;sentence2;label\nb;c;yes\n", r"dev.csv:1: the columns .* are separated by ';'"),
        ("dev.tsv", "label\tsentence1\tlabel\n", r"dev.tsv:1: column 'label' occurs 2 times; rename"),
        ("dev.jsonl", '{"sentence1": "a"\n', r"dev.jsonl:1: no valid JSON"),
        ("dev.jsonl", "[1]\n", r"dev.jsonl:1: a JSON list where an object"),
        ("dev.xml", "<a/>", r"the ending '.xml' is no format read here; use one of .tsv"),
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
    with pytest.raises(ValueError, match=rf"train.tsv:3: '{value}' is no score"):
        read_examples(tmp_path / "train.tsv", own_task("regression", tmp_path, dev_file="train.tsv"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no train.tsv, train.csv, train.jsonl or folder train; .*--train-file"),
        ({"train.tsv": PAIRS, "train.csv": "a"}, "holds train.tsv and train.csv; .*--train-file"),
        ({"train.tsv": PAIRS}, "holds no dev.tsv"),
        ({"train.tsv": "sentence\tlabel\na\tx\n", "dev.tsv": PAIRS}, "every row has the label 'x'; .*at least two"),
        ({"train.tsv": "", "dev.tsv": PAIRS}, "train.tsv holds no row; give it a header"),
    ],
)
def test_a_folder_that_is_no_task(tmp_path, files, message):
    for name, content in files.items():
        write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        own_task("classification", tmp_path)


def test_a_missing_label_column_in_the_training_file_is_named(tmp_path):
    path = write(tmp_path, "train.tsv", "sentence\ttarget\na\tx\n")
    with pytest.raises(ValueError, match=r"train.tsv:2: column 'label' is missing; .* the file has sentence, target"):
        read_examples(path, own_task("classification", tmp_path, dev_file="train.tsv"))


def test_a_missing_file_says_what_the_folder_holds(tmp_path):
    write(tmp_path, "train.subset.tsv", PAIRS)
    with pytest.raises(ValueError, match=r"train.tsv does not exist; the folder holds train.subset.tsv"):
        list(read_rows(tmp_path / "train.tsv"))


def test_a_row_without_a_label_is_named(tmp_path):
    write(tmp_path, "train.jsonl", '{"sentence": "a", "label": "x"}\n{"sentence": "b"}\n')
    with pytest.raises(ValueError, match=r"train.jsonl:2: column 'label' is missing"):
        read_examples(tmp_path / "train.jsonl", own_task("classification", tmp_path, dev_file="train.jsonl"))
