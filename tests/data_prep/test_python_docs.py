"""The quick start's text: prose from docstrings, no leak between the parts, a task that one passage cannot solve."""

import csv
import json
import subprocess
import sys

import pytest

from data_prep.python_docs import (
    LEAK_WORDS,
    LONGEST_PASSAGE,
    PASSAGE_WORDS,
    clean_docstring,
    collect_documents,
    cut_passages,
    drop_repeated,
    find_modules,
    is_prose,
    main,
    make_task,
    normalised_words,
    read_docstrings,
    split_by_module,
    split_sentences,
)

NUMPY_STYLE = """
    Return the sum of the values along an axis\r
    of the array that is given.

    Parameters
    ----------
    axis : int, optional
        The axis along which the values of the array are added,
        or None for all of them.
    out : array

    See :class:`~numpy.ndarray` and ``numpy.add`` for what is done when the types are mixed [1]_.

    >>> total([1, 2])
    3

    Like so::

        for the value in the array: add it to the sum of the others.

    =====  ==========================================
    a      the first of the columns is in the table.
    =====  ==========================================

    .. math:: the sum of all of the values is in the formula.

    .. note:: It is up to the caller that the sum can be held in the type.
"""


def test_prose_is_kept_and_the_rest_dropped():
    assert clean_docstring(NUMPY_STYLE) == [
        "Return the sum of the values along an axis of the array that is given.",
        "The axis along which the values of the array are added, or None for all of them.",
        "See numpy.ndarray and numpy.add for what is done when the types are mixed.",
        "It is up to the caller that the sum can be held in the type.",
    ]


@pytest.mark.parametrize(
    "docstring",
    [
        "Args:\n    size (int): The number of rows that are\n        read from the file at once.",
        ":param size: The number of rows that are\n    read from the file at once.",
        "- The number of rows that are\n  read from the file at once.",
    ],
)
def test_an_argument_description_is_one_paragraph(docstring):
    assert clean_docstring(docstring) == ["The number of rows that are read from the file at once."]


@pytest.mark.parametrize(
    "text",
    [
        "Too short to be of use.",
        "The words of this sentence go on without an end",
        "alpha, beta, gamma, delta, epsilon, zeta, eta, theta, iota, kappa.",
        "x = (1 + 2) * 3; y[0] = {4: 5, 6: 7}; z -> {8, 9} is the result of it.",
        "The value of \\frac{a}{b} is the sum of the parts of it.",
        "",
    ],
)
def test_what_is_not_prose(text):
    assert not is_prose(text)


def test_docstrings_are_read_without_running_the_source():
    source = b'"""Of the module."""\nraise SystemExit\nclass A:\n  """Of A."""\n  def f(self):\n    """Of f."""\n'
    assert read_docstrings(source) == ["Of the module.", "Of A.", "Of f."]
    assert read_docstrings(b'"""Cut off') == []
    assert read_docstrings(b'x = """\0"""') == []


def test_repeated_paragraphs_stay_where_they_first_occur():
    documents = {"a": ["One of them.", "Two, of 3 of them."], "b": ["one of THEM"], "c": ["Two of 4 of them.", "New."]}
    assert drop_repeated(documents) == {"a": ["One of them.", "Two, of 3 of them."], "c": ["New."]}


def long_runs(documents):
    texts = [normalised_words(text) for paragraphs in documents.values() for text in paragraphs]
    return {tuple(words[i : i + LEAK_WORDS]) for words in texts for i in range(len(words) - LEAK_WORDS + 1)}


def test_a_copied_text_is_not_on_both_sides():
    copied = "this sentence was copied from one module into many others"
    documents = {
        f"module{i}": [f"In number {i}, {copied}.", f"Only here: {chr(97 + i // 26)}{chr(97 + i % 26)}."]
        for i in range(100)
    }
    train, heldout = split_by_module(documents)
    assert 2 <= len(heldout) <= 25 and not set(train) & set(heldout)
    assert long_runs(train) and not long_runs(train) & long_runs(heldout)


def test_sentences():
    paragraph = "It is so, e.g. The one. Is it? Yes! see below."
    assert split_sentences(paragraph) == ["It is so, e.g. The one.", "Is it?", "Yes! see below."]


def test_passages_are_whole_sentences_of_bounded_length():
    paragraphs = [f"Sentence {i} is {'very ' * i}short." for i in range(60)]
    passages = cut_passages(paragraphs)
    assert all(PASSAGE_WORDS <= len(passage.split()) <= LONGEST_PASSAGE for passage in passages)
    assert all(passage.startswith("Sentence") for passage in passages)
    assert "".join(paragraphs).replace(" ", "").startswith(passages[0].replace(" ", ""))


def test_a_pair_is_right_or_of_two_modules_and_one_passage_gives_no_hint():
    word = "abcdefghij"
    documents = {f"m{m}": [f"In {m} the {word[k]}{' of it' * 13} is." for k in range(10)] for m in range(20)}
    rows = make_task(documents, num_rows=60, seed="train")
    assert rows == make_task(documents, num_rows=60, seed="train") != make_task(documents, 60, "dev")
    assert len(rows) == 60 and sum(label for *_, label in rows) == 30
    follows = {pair for texts in documents.values() for pair in zip(texts[:-1], texts[1:], strict=True)}
    assert all(((first, second) in follows) == (label == 1) for first, second, label in rows)
    assert all((first.split()[1] == second.split()[1]) == (label == 1) for first, second, label in rows)
    passages = [passage for *pair, _ in rows for passage in pair]
    assert len(set(passages)) == len(passages)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("python_docs") / "text"
    main(["--output", str(folder), "--max-mb", "0.2"])
    return folder


def read_jsonl(path):
    return {row["id"]: row["text"].split("\n\n") for row in map(json.loads, path.read_text().splitlines())}


def test_the_files_of_this_machine(output):
    train, heldout = (read_jsonl(output / "pretrain" / f"{part}.jsonl") for part in ("train", "heldout"))
    num_bytes = sum(len(text.encode()) for part in (train, heldout) for texts in part.values() for text in texts)
    assert 0.1e6 < num_bytes < 0.3e6 and heldout
    assert not set(train) & set(heldout) and not long_runs(train) & long_runs(heldout)
    for part, documents in (("train", train), ("dev", heldout)):
        with open(output / "task" / f"{part}.tsv", newline="") as file:
            header, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        assert header == ["sentence1", "sentence2", "label"] and {len(row) for row in rows} == {3}
        modules = [" ".join(paragraphs) for paragraphs in documents.values()]
        for first, second, label in rows:
            assert any(first in module and second in module for module in modules) == (label == "1")


def test_the_same_bytes_in_another_process(output, tmp_path):
    command = [sys.executable, "-m", "data_prep.python_docs", "--output", tmp_path / "text", "--max-mb", "0.2"]
    subprocess.run(command, check=True, capture_output=True)
    names = ["pretrain/train.jsonl", "pretrain/heldout.jsonl", "task/train.tsv", "task/dev.tsv", "manifest.json"]
    assert [(output / name).read_bytes() for name in names] == [
        (tmp_path / "text" / name).read_bytes() for name in names
    ]


def test_a_finished_folder_is_reused_and_a_foreign_one_left_alone(output, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    main(["--output", str(output), "--max-mb", "0.2"])
    assert "reused" in capsys.readouterr().out
    with pytest.raises(ValueError, match="max_mb"):
        main(["--output", str(output), "--max-mb", "1"])
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        main(["--output", str(tmp_path)])


@pytest.mark.parametrize("value", ["0", "-1", "nan"])
def test_an_impossible_size_is_refused_before_anything_is_written(value, tmp_path):
    with pytest.raises(ValueError, match="--max-mb"):
        main(["--output", str(tmp_path / "text"), f"--max-mb={value}"])
    assert not (tmp_path / "text").exists()


def test_modules_are_named_as_they_are_imported():
    modules = dict(find_modules(["torch"]))
    assert {"json", "json.decoder", "torch", "torch.nn.modules.linear"} <= set(modules)
    assert not any("test" in name.split(".") for name in modules)


def test_a_limit_reads_no_more_than_it_needs(tmp_path):
    documented = '"""The number of the rows that can be read from this file."""'
    for i in range(10):
        (tmp_path / f"m{i}.py").write_text(documented.replace("rows", "rows" + "abcdefghij"[i]))
    modules = [(f"m{i}", tmp_path / f"m{i}.py") for i in range(10)]
    assert sum(len(texts) for texts in collect_documents(modules, max_bytes=1).values()) < 10
