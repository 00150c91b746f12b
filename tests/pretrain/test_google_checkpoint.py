"""Checkpoints as google-research/bert releases them: their names, and a folder that TensorFlow has written."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pretrain import convert
from pretrain.google_checkpoint import google_name
from pretrain.weights import open_weights
from tests.pretrain.test_convert import SHAPE, save_hugging_face
from tests.ranks import run_ranks

GOOGLE_NAMES = {
    "bert.embeddings.word_embeddings.weight": "bert/embeddings/word_embeddings",
    "bert.embeddings.LayerNorm.weight": "bert/embeddings/LayerNorm/gamma",
    "bert.encoder.layer.0.attention.self.query.weight": "bert/encoder/layer_0/attention/self/query/kernel",
    "bert.encoder.layer.11.attention.output.LayerNorm.bias": "bert/encoder/layer_11/attention/output/LayerNorm/beta",
    "bert.encoder.layer.3.intermediate.dense.bias": "bert/encoder/layer_3/intermediate/dense/bias",
    "bert.pooler.dense.weight": "bert/pooler/dense/kernel",
    "cls.predictions.bias": "cls/predictions/output_bias",
    "cls.predictions.transform.dense.weight": "cls/predictions/transform/dense/kernel",
    "cls.predictions.transform.LayerNorm.weight": "cls/predictions/transform/LayerNorm/gamma",
    "cls.seq_relationship.weight": "cls/seq_relationship/output_weights",
    "cls.seq_relationship.bias": "cls/seq_relationship/output_bias",
}


def test_google_names():
    assert {name: google_name(name) for name in GOOGLE_NAMES} == GOOGLE_NAMES


@pytest.fixture
def google_folder(vocabulary, tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder as google-research/bert releases them, written by TensorFlow, and the same tensors of transformers."""
    tensorflow = pytest.importorskip("tensorflow", reason="no TensorFlow; it is the extra [tensorflow]")
    folder = tmp_path / "google"
    original = save_hugging_face(folder, "BertForPreTraining", vocabulary)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").rename(folder / "bert_config.json")
    variables = {"global_step": np.int64(1_000_000)}
    for name, tensor in original.items():
        is_kernel = google_name(name).endswith("/kernel")
        variables[google_name(name)] = tensor.numpy().T if is_kernel else tensor.numpy()
        variables[google_name(name) + "/adam_m"] = np.zeros_like(variables[google_name(name)])
    tensorflow.raw_ops.SaveV2(
        prefix=str(folder / "bert_model.ckpt"),
        tensor_names=list(variables),
        shape_and_slices=[""] * len(variables),
        tensors=[tensorflow.constant(value) for value in variables.values()],
    )
    return folder, original


@pytest.mark.parametrize("name", ["", "bert_model.ckpt"])
def test_googles_checkpoint_becomes_a_hugging_face_folder(name, google_folder, tmp_path):
    folder, original = google_folder
    run_ranks(convert.main, 1, ["--checkpoint", str(folder / name), "--output", str(tmp_path / "hf")])
    converted = load_file(tmp_path / "hf/model.safetensors")
    assert converted.keys() == original.keys()
    assert all(torch.equal(converted[name], original[name]) for name in original)


def test_without_tensorflow_the_extra_is_named(tmp_path):
    if importlib.util.find_spec("tensorflow"):
        pytest.skip("TensorFlow is installed")
    (tmp_path / "bert_model.ckpt.index").touch()
    (tmp_path / "bert_config.json").write_text(json.dumps(SHAPE.to_dict()))
    with pytest.raises(ValueError, match=r"pip install -e '\.\[tensorflow\]'"):
        open_weights(tmp_path)


def test_one_of_several_tensorflow_checkpoints_must_be_named(tmp_path):
    for step in (10, 20):
        (tmp_path / f"model.ckpt-{step}.index").touch()
    with pytest.raises(ValueError, match="several TensorFlow checkpoints"):
        open_weights(tmp_path)
