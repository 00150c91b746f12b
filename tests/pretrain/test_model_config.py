"""Model shapes: presets, Hugging Face files, and messages that name value, rule and way out."""

import dataclasses
import json

import pytest

from pretrain.model_config import ModelConfig, load_model_config


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
        ({"hidden_dropout_prob": 1.5}, "must be a number from 0 to 1, but not 1"),
        ({"hidden_dropout_prob": "0.1"}, "hidden_dropout_prob='0.1' must be a number"),
        ({"initializer_range": float("nan")}, "initializer_range=nan must be a number"),
        ({"layer_norm_eps": -1e-12}, "layer_norm_eps=-1e-12 must be a number of at least 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a whole number of at least 1"),
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
