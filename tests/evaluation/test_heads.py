"""The sequence head against Hugging Face's: same weights, same batch, no dropout."""

import numpy as np
import pytest
import torch
import transformers

from evaluation.features import Features, gather_batch
from evaluation.heads import BertForSequenceClassification, sequence_loss
from pretrain.config import ModelConfig
from pretrain.layout import init_layout
from pretrain.model import init_weights

CONFIG = ModelConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                     max_position_embeddings=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
LENGTHS = [9, 24, 3, 16]


def make_features(labels):
    generator = np.random.default_rng(0)
    start = np.cumsum([0, *LENGTHS])
    return Features(generator.integers(5, 256, start[-1]), start, np.array([4, 12, 3, 16]), labels, num_truncated=0)


def padded_batch(features):
    """The same batch as Hugging Face reads it: [B, S] and a mask."""
    index = torch.arange(max(LENGTHS))[None].repeat(len(LENGTHS), 1)
    mask = index < torch.tensor(LENGTHS)[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    ids[mask] = torch.from_numpy(features.token_ids)
    segments = ((index >= torch.from_numpy(features.segment_b_start)[:, None]) & mask).long()
    return {"input_ids": ids, "attention_mask": mask.long(), "token_type_ids": segments}


@pytest.mark.parametrize(
    "labels", [np.array([0, 2, 1, 2]), np.array([0.5, 5.0, 2.25, 0.0], np.float32)], ids=["classes", "scores"]
)
def test_equal_to_hugging_face(labels):
    is_regression = labels.dtype == np.float32
    model = BertForSequenceClassification(CONFIG, init_layout(), num_outputs=1 if is_regression else 3)
    init_weights(model, seed=1)
    reference_config = transformers.BertConfig(**CONFIG.to_json(), num_labels=1 if is_regression else 3)
    reference = transformers.BertForSequenceClassification(reference_config)
    # Strict: the export of a fine-tuned model is a copy of all parameters under their own names.
    reference.load_state_dict({name: parameter.data for name, parameter in model.named_parameters()}, strict=True)

    features = make_features(labels)
    sequences, batch_labels = gather_batch(features, np.arange(len(LENGTHS)))
    logits = model(sequences)
    loss = sequence_loss(logits, batch_labels)
    loss.backward()
    expected = reference(**padded_batch(features), labels=torch.from_numpy(labels))
    expected.loss.backward()

    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=0)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_dropout_is_a_function_of_its_seed():
    config = ModelConfig(256, 32, 1, 4, 64, max_position_embeddings=24)
    model = BertForSequenceClassification(config, init_layout(), num_outputs=2)
    init_weights(model, seed=1)
    sequences, _ = gather_batch(make_features(np.zeros(4, np.int64)), np.arange(4))
    first, again, other, off = (model(sequences, seed) for seed in ((0, 1), (0, 1), (0, 2), None))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, off)
