"""Starts of a fine-tuning: a checkpoint of our own gives its weights back, a head starts from its seed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BertTokenizer

from data_prep.text.vocab_files import Folding
from evaluation.start import EMBEDDINGS, fill_model, find_start, read_encoder, rescale_embeddings
from evaluation.tasks.heads import BertForQuestionAnswering, BertForSequenceClassification, BertForTokenClassification
from pretrain.checkpoint import save_checkpoint
from pretrain.data import pack_sequences
from pretrain.engine import initialize_engine
from pretrain.layout import init_layout
from pretrain.model import BertForPreTraining, init_weights
from pretrain.model_config import ModelConfig

CONFIG = ModelConfig(vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]
DEEPSPEED = {
    "train_batch_size": 1,
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
}


@pytest.fixture
def run(tmp_path):
    """A run folder with one checkpoint, and the module that was saved."""
    layout = init_layout()
    module = BertForPreTraining(CONFIG, layout)
    init_weights(module, seed=7)
    engine, _ = initialize_engine(module, DEEPSPEED, layout)
    save_checkpoint(engine, layout, tmp_path, step=3, keep=1)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_json()), encoding="utf-8")
    (tmp_path / "vocab.txt").write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
    return tmp_path, module


def test_a_checkpoint_gives_its_encoder_back(run):
    folder, module = run
    start = find_start(str(folder), None, None)
    named = find_start(str(folder / "checkpoints/step_00000003"), None, folder / "vocab.txt")
    assert named.weights.path == start.weights.path
    assert (start.weights.path.name, start.config, start.tokenizer.vocab_size) == ("step_00000003", CONFIG, 12)
    models = [BertForSequenceClassification(CONFIG, init_layout(), num_outputs=2) for _ in range(2)]
    encoder = read_encoder(start)
    drawn = [fill_model(model, encoder, seed) for seed, model in enumerate(models)]
    assert drawn == [["classifier.weight", "classifier.bias"]] * 2
    for (name, first), second in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if name.startswith("bert."):
            assert torch.equal(first, module.get_parameter(name)), name
        assert torch.equal(first, second) == (name != "classifier.weight"), name


def test_rescaled_embeddings_make_the_same_function(run):
    start = find_start(str(run[0]), None, None)
    encoder = {name: tensor * 5 if name in EMBEDDINGS else tensor for name, tensor in read_encoder(start).items()}
    rescaled = rescale_embeddings(encoder, CONFIG)
    assert rescaled[EMBEDDINGS[0]].std().item() == pytest.approx(CONFIG.initializer_range)
    sequences = pack_sequences(np.arange(12), np.array([5, 7]), np.array([2, 7]))
    logits = []
    for weights in (encoder, rescaled):
        model = BertForSequenceClassification(CONFIG, init_layout(), num_outputs=2)
        fill_model(model, weights, seed=0)
        logits.append(model(sequences))
    assert not torch.equal(encoder[EMBEDDINGS[1]], rescaled[EMBEDDINGS[1]])
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)
    for other, message in (
        ({"model_type": "megatron-bert"}, "no LayerNorm"),
        ({"position_embedding_type": "sinusoidal"}, "are not scaled"),
    ):
        with pytest.raises(ValueError, match=message):
            rescale_embeddings(encoder, replace(CONFIG, **other))


def test_dropout_of_ones_own(run):
    folder, _ = run
    for checkpoint, model, vocab in ((str(folder), None, None), ("random", str(folder / "config.json"), folder)):
        config = find_start(checkpoint, model, vocab, dropout=0.25).config
        assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.25, 0.25)
        assert config.with_dropout(CONFIG.hidden_dropout_prob) == CONFIG == CONFIG.with_dropout(None)


@pytest.mark.parametrize("head", [BertForQuestionAnswering, BertForTokenClassification])
def test_heads_on_tokens_take_the_encoder_without_its_pooler(run, head):
    folder, module = run
    model = head(CONFIG, init_layout(), num_outputs=2)
    drawn = fill_model(model, read_encoder(find_start(str(folder), None, None)), seed=0)
    assert all(not name.startswith("bert.") for name in drawn) and len(drawn) == 2
    for name, parameter in model.bert.named_parameters():
        assert torch.equal(parameter, module.bert.get_parameter(name)), name


def test_random_weights_follow_the_seed(run):
    folder, module = run
    start = find_start("random", str(folder / "config.json"), folder)
    model = BertForSequenceClassification(CONFIG, init_layout(), num_outputs=2)
    assert len(fill_model(model, read_encoder(start), seed=7)) == len(list(model.parameters()))
    assert torch.equal(model.bert.pooler.dense.weight, module.bert.pooler.dense.weight)


def test_the_vocabulary_may_have_any_name_and_kind(run, tmp_path_factory):
    """tokens.txt, a tokenizer.json that transformers saved, or none there and --vocab."""
    folder, _ = run
    tokens = find_start(str(folder), None, None).tokenizer.tokens
    (folder / "vocab.txt").rename(folder / "tokens.txt")
    assert find_start(str(folder), None, folder / "tokens.txt", cased=True).tokenizer.folding == Folding(False, False)
    elsewhere = tmp_path_factory.mktemp("vocab") / "words.txt"
    (folder / "tokens.txt").rename(elsewhere)
    with pytest.raises(ValueError, match="must hold exactly one vocabulary"):
        find_start(str(folder), None, None)
    assert find_start(str(folder), None, elsewhere).tokenizer.tokens == tokens
    theirs = BertTokenizer(str(elsewhere), do_lower_case=False)
    theirs.save_pretrained(folder / "saved")
    (folder / "saved/tokenizer.json").rename(folder / "tokenizer.json")
    for vocab in (None, elsewhere):
        tokenizer = find_start(str(folder), None, vocab).tokenizer
        assert (tokenizer.path.name, tokenizer.tokens, tokenizer.folding[:2]) == (
            "tokenizer.json",
            tokens,
            (False, False),
        )
        assert tokenizer.encode("a b [MASK] A") == theirs("a b", add_special_tokens=False)["input_ids"] + [1] * 4
    elsewhere.write_text("\n".join([*TOKENS[:-1], "h"]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="its ids would refer to other tokens"):
        find_start(str(folder), None, elsewhere)
    with pytest.raises(ValueError, match="--uncased: .* states that it is cased"):
        find_start(str(folder), None, None, cased=False)


def test_a_vocabulary_that_is_larger_than_the_embedding_is_refused(run):
    (run[0] / "vocab.txt").write_text("\n".join([*TOKENS, "h"]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="vocab_size=12 is less than the 13 tokens of vocab.txt"):
        find_start(str(run[0]), None, None)


def test_a_folder_without_a_bert_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint here"):
        (tmp_path / "empty").mkdir()
        find_start(str(tmp_path / "empty"), None, None)


def test_a_config_of_another_shape_is_refused(run):
    folder, _ = run
    other = {**CONFIG.to_json(), "intermediate_size": 64}
    (folder / "config.json").write_text(json.dumps(other), encoding="utf-8")
    start = find_start(str(folder), None, None)
    with pytest.raises(ValueError, match="does not fit the model"):
        fill_model(BertForSequenceClassification(start.config, init_layout(), 2), read_encoder(start), seed=0)
