"""The official layouts: row counts of the published files where they are on this machine, and a few rows of each."""

from fnmatch import fnmatch
from pathlib import Path

import pytest

from evaluation.tasks.classification import Example, read_examples
from evaluation.tasks.glue import GLUE_TASKS

GLUE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "glue"
FOLDERS = {"cola": "CoLA", "sst-2": "SST-2", "mrpc": "MRPC", "sts-b": "STS-B", "qqp": "QQP",
           "mnli": "MNLI", "qnli": "QNLI", "rte": "RTE", "wnli": "WNLI"}  # fmt: skip
NUM_ROWS = {
    "cola": {"train.tsv": 8551, "dev.tsv": 1043, "test.tsv": 1063},
    "sst-2": {"train.tsv": 67349, "dev.tsv": 872, "test.tsv": 1821},
    "mrpc": {"train.tsv": 3668, "dev.tsv": 408, "test.tsv": 1725},
    "sts-b": {"train.tsv": 5749, "dev.tsv": 1500, "test.tsv": 1379},
    "rte": {"train.tsv": 2490, "dev.tsv": 277, "test.tsv": 3000},
    "wnli": {"train.tsv": 635, "dev.tsv": 71, "test.tsv": 146},
    "qnli": {"train.subset.tsv": 8999, "dev.subset.tsv": 1000, "dev.tsv": 5463, "test.tsv": 5463, "16-*.tsv": 32},
    "mnli": {"train.subset.tsv": 8999, "dev.subset.tsv": 1000, "dev_matched.tsv": 9815, "16-*.tsv": 48, "AX.tsv": 1104},
    "qqp": {"train.subset.tsv": 8999, "dev.subset.tsv": 1000, "16-*.tsv": 32},
}


@pytest.mark.parametrize("name", NUM_ROWS)
def test_row_counts_of_all_published_files(name):
    """MNLI also reads the diagnostics (AX)."""
    paths = sorted((GLUE / FOLDERS[name]).rglob("*.tsv")) + ([GLUE / "AX" / "AX.tsv"] if name == "mnli" else [])
    if not paths or not paths[0].is_file():
        pytest.skip(f"the files of {name} are not on this machine")
    for path in paths:
        (num_rows,) = (count for pattern, count in NUM_ROWS[name].items() if fnmatch(path.name, pattern))
        examples = read_examples(path, GLUE_TASKS[name], labelled=path.name not in ("test.tsv", "AX.tsv"))
        assert (path.name, len(examples)) == (path.name, num_rows)
        assert all(example.text for example in examples)


LAYOUTS = {
    "cola": "gj04\t0\t*\tWe goes.\n",
    "sst-2": 'sentence\tlabel\n" good " \t1\n',
    "mrpc": '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe said " no .\tNo .\n',
    "sts-b": "index\tgenre\tsentence1\tsentence2\tscore\n0\tg\tA plane.\tA jet.\t4.750\n",
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tHow?\tWhy?\t0\n4\t5\t6\ta broken row\n",
    "mnli": "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tA.\tB.\tneutral\tcontradiction\n",
    "qnli": "index\tquestion\tsentence\tlabel\n0\tWho?\tMe.\tnot_entailment\n",
    "rte": "index\tsentence1\tsentence2\tlabel\r\n0\tA.\tB.\tentailment\r\n",
    "wnli": "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\t1\n",
}
EXPECTED = {
    "cola": Example("We goes.", None, 0),
    "sst-2": Example('" good " ', None, 1),
    "mrpc": Example('He said " no .', "No .", 1),
    "sts-b": Example("A plane.", "A jet.", 4.75),
    "qqp": Example("How?", "Why?", 0),
    "mnli": Example("A.", "B.", 0),
    "qnli": Example("Who?", "Me.", 1),
    "rte": Example("A.", "B.", 0),
    "wnli": Example("A.", "B.", 1),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout(tmp_path, name):
    path = tmp_path / GLUE_TASKS[name].train_file
    path.write_bytes(LAYOUTS[name].encode())
    assert read_examples(path, GLUE_TASKS[name]) == [EXPECTED[name]]


def test_a_similarity_outside_zero_to_five_is_refused(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("sentence1\tsentence2\tscore\nA\tB\t5.5\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train.tsv:2: '5.5' is not a score of task sts-b, a number from 0 to 5"):
        read_examples(path, GLUE_TASKS["sts-b"])


def test_the_file_of_another_task_is_refused(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\nfine\t1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train.tsv:2: column 'question1' is missing; task qqp reads"):
        read_examples(path, GLUE_TASKS["qqp"])
