"""Sentence vectors against Hugging Face's hidden states, and bad input."""

import numpy as np
import pytest
import torch
import transformers

from data_prep.cli import run_cli
from evaluation.embed import main
from tests.evaluation.test_finetune import MODEL, WORDS

LINES = ["the red hat is here", "", "box", "the green box"]


@pytest.fixture
def folder(tmp_path):
    transformers.BertForPreTraining(transformers.BertConfig(**MODEL)).save_pretrained(tmp_path / "hf")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (tmp_path / "hf/vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    (tmp_path / "lines.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return tmp_path


def command(folder, **changes):
    flags = {"checkpoint": folder / "hf", "input": folder / "lines.txt", "output": folder / "v.npy"}
    flags |= {"seq-length": 16} | changes
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_vectors_are_those_of_hugging_face(folder, pooling, capsys):
    main(command(folder, pooling=pooling))
    assert "4 vectors of 32" in capsys.readouterr().out
    vectors = np.load(folder / "v.npy")
    model = transformers.BertModel.from_pretrained(folder / "hf").eval()
    for line, vector in zip(LINES, vectors, strict=True):
        ids = torch.tensor([[2, *(5 + WORDS.index(word) for word in line.split()), 3]])
        hidden = model(ids).last_hidden_state[0].detach().numpy()
        expected = hidden[0] if pooling == "cls" else hidden.mean(0)
        np.testing.assert_allclose(vector, expected, rtol=0, atol=1e-5)  # measured: 1.2e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "vectors.txt"}, "--output vectors.txt: choose a name that ends in .npy"),
        ({"checkpoint": "random"}, "vectors of random weights mean nothing"),
        ({"seq-length": 17}, "--seq-length 17: the model has 16 positions; choose at most that"),
        ({"input": "empty.txt"}, "empty.txt is empty"),
    ],
)
def test_bad_input_is_refused(folder, changes, message, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "empty.txt").write_text("")
    with pytest.raises(SystemExit) as exit_info:
        run_cli(main, command(folder, **changes))
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert not (folder / "v.npy").exists()
