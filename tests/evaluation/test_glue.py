"""The official layouts: row counts of the published files where they are at hand, and each layout in a few rows written
here.
"""

from pathlib import Path

import pytest

from evaluation.classification import Example, read_examples
from evaluation.glue import GLUE_TASKS

GLUE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "glue"
FOLDERS = {"cola": "CoLA", "sst-2": "SST-2", "mrpc": "MRPC", "sts-b": "STS-B", "qqp": "QQP",
           "mnli": "MNLI", "qnli": "QNLI", "rte": "RTE", "wnli": "WNLI"}  # fmt: skip
NUM_ROWS = [
    ("cola", "train.tsv", 8551), ("cola", "dev.tsv", 1043), ("cola", "test.tsv", 1063),
    ("sst-2", "train.tsv", 67349), ("sst-2", "dev.tsv", 872), ("sst-2", "test.tsv", 1821),
    ("mrpc", "train.tsv", 3668), ("mrpc", "dev.tsv", 408), ("mrpc", "test.tsv", 1725),
    ("sts-b", "train.tsv", 5749), ("sts-b", "dev.tsv", 1500), ("sts-b", "test.tsv", 1379),
    ("rte", "train.tsv", 2490), ("rte", "dev.tsv", 277), ("rte", "test.tsv", 3000),
    ("wnli", "train.tsv", 635), ("wnli", "dev.tsv", 71), ("wnli", "test.tsv", 146),
    ("qnli", "train.subset.tsv", 8999), ("qnli", "dev.tsv", 5463), ("qnli", "test.tsv", 5463),
    ("mnli", "train.subset.tsv", 8999), ("mnli", "dev_matched.tsv", 9815),
    ("mnli", "official_layout_sample/16-13.train.tsv", 48),
    ("qqp", "train.subset.tsv", 8999), ("qqp", "dev.subset.tsv", 1000),
    ("qqp", "official_layout_sample/16-42.dev.tsv", 32),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "num_rows"), NUM_ROWS)
def test_row_counts_of_the_published_files(name, file, num_rows):
    path = GLUE / FOLDERS[name] / file
    if not path.is_file():
        pytest.skip(f"{path.name} of {name} is not on this machine")
    examples = read_examples(path, GLUE_TASKS[name], labelled="test" not in file)
    assert len(examples) == num_rows
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
    with pytest.raises(ValueError, match=r"train.tsv:2: '5.5' is outside task sts-b; a number from 0 to 5"):
        read_examples(path, GLUE_TASKS["sts-b"])


def test_the_file_of_another_task_is_refused(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\nfine\t1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train.tsv:2: column 'question1' is missing; task qqp reads"):
        read_examples(path, GLUE_TASKS["qqp"])
