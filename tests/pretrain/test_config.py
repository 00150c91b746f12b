"""Model shapes and DeepSpeed files: presets, Hugging Face files, and messages that name value, rule and way out."""

import dataclasses
import json

import pytest

from pretrain.config import ModelConfig, engine_config, load_deepspeed_config, load_model_config, num_accumulation_steps

GOOD = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "Lamb", "params": {"lr": 1e-3}},
    "scheduler": {"type": "WarmupPolynomialLR", "params": {"total_num_steps": 10}},
}


def test_bert_base_has_the_published_number_of_matrix_products():
    """BERT-large at 128 tokens with 20 predictions costs about 0.241 TFLOP forward and backward a sequence."""
    assert load_model_config("large", 30522).training_flops([128], 20) == pytest.approx(0.241e12, rel=0.02)


@pytest.mark.parametrize(("preset", "family"), [("large", "Bert"), ("3.9b", "MegatronBert")])
def test_a_config_names_the_class_that_hugging_face_loads(preset, family, tmp_path):
    """Beyond large, LayerNorm comes first; without a pair task there is only the masked-language-model head."""
    config = load_model_config(preset, 100)
    assert config.to_json()["architectures"] == [f"{family}ForPreTraining"]
    plain = dataclasses.replace(config, pair_task="none")
    assert plain.to_json()["architectures"] == [f"{family}ForMaskedLM"]
    (tmp_path / "config.json").write_text(json.dumps(plain.to_json()))
    assert load_model_config(tmp_path / "config.json") == plain


def test_the_vocabulary_is_padded_to_128_by_tp():
    assert [load_model_config("tiny", 30522).padded_vocab_size(tp) for tp in (1, 2, 4)] == [30592, 30720, 30720]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "swish"}, "hidden_act='swish' is unknown"),
        ({"num_attention_heads": 5}, "cannot be split over num_attention_heads=5"),
        ({"hidden_dropout_prob": 1.5}, "not a probability"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is not a positive"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        (
            {"position_embedding_type": "sinusoidal", "hidden_size": 33, "num_attention_heads": 3},
            "hidden_size=33 is odd",
        ),
        ({"model_type": "roberta"}, "model_type='roberta' is unknown"),
        ({"pair_task": "nps"}, "pair_task='nps' is unknown"),
    ],
)
def test_a_wrong_model_file_is_refused(change, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(load_model_config("tiny", 100).to_json() | change))
    with pytest.raises(ValueError, match=message):
        load_model_config(path)


def test_a_file_whose_vocabulary_is_too_small_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(load_model_config("tiny", 100).to_json()))
    assert isinstance(load_model_config(path, 100), ModelConfig)
    with pytest.raises(ValueError, match="vocab_size=100 is less than the vocabulary's 101"):
        load_model_config(path, 101)


def test_what_deepspeed_is_given(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(GOOD))
    config = load_deepspeed_config(path, ["optimizer.params.lr=0.5", "zero_optimization.stage=2"])
    assert config["optimizer"]["params"]["lr"] == 0.5
    assert num_accumulation_steps(config, dp_size=2) == 4
    derived = engine_config(config)
    assert "optimizer" not in derived and "scheduler" not in derived
    assert derived["zero_optimization"] == {"stage": 2} and derived["zero_allow_untested_optimizer"]
    assert json.loads(path.read_text()) == GOOD


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[1]", "expected a JSON object"), (json.dumps(GOOD | {"optimizer": 3}), "optimizer must be")],
)
def test_a_broken_deepspeed_file_is_named(text, message, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_deepspeed_config(path)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "lr=None must be a learning rate"),
        ({"lr": True}, "lr=True must be"),
        ({"lr": 1e-3, "betas": [0.9]}, r"betas=\[0.9\] must be two numbers"),
        ({"lr": 1e-3, "betas": [0.9, 1]}, "betas"),
        ({"lr": 1e-3, "eps": 0}, "eps=0 must be"),
        ({"lr": 1e-3, "weight_decay": "0.01"}, "weight_decay='0.01' must be"),
        ({"lr": 1e-3, "min_trust_ratio": -1}, "min_trust_ratio=-1 must be"),
        ({"lr": 1e-3, "min_trust_ratio": 0.5, "max_trust_ratio": 0.3}, "max_trust_ratio=0.3 must be a number above"),
        ({"lr": 1e-3, "momentum": 0.9}, "unknown key 'momentum'"),
    ],
)
def test_an_optimizers_wrong_value_is_named(params, message, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(GOOD | {"optimizer": {"type": "Lamb", "params": params}}))
    with pytest.raises(ValueError, match=message):
        load_deepspeed_config(path)
