"""The heads against Hugging Face's: same weights, same batch, no dropout: loss, logits, predictions, all gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from evaluation.tasks import heads
from evaluation.tasks.features import Features, gather_batch, split_logits
from pretrain.layout import init_layout
from pretrain.model import init_weights
from pretrain.model_config import ModelConfig

CONFIG = ModelConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                     max_position_embeddings=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                     initializer_range=0.2)  # fmt: skip
LENGTHS = [9, 24, 3, 16]
NUM_TOKENS = sum(LENGTHS)
TOKEN_LABELS = np.arange(NUM_TOKENS) % 4
TOKEN_LABELS[TOKEN_LABELS == 3] = -100

CASES = {
    "classes": ("BertForSequenceClassification", heads.sequence_loss, 3, np.array([0, 2, 1, 2])),
    "scores": ("BertForSequenceClassification", heads.sequence_loss, 1, np.array([0.5, 5.0, 2.25, 0.0], np.float32)),
    "tokens": ("BertForTokenClassification", heads.token_loss, 3, TOKEN_LABELS),
    "spans": ("BertForQuestionAnswering", heads.span_loss, 2, np.array([[2, 5], [0, 23], [1, 1], [7, 15]])),
}


def make_features(labels, lengths=LENGTHS):
    generator = np.random.default_rng(0)
    start = np.cumsum([0, *lengths])
    segment_b_start = np.array(lengths) // 2
    return Features(generator.integers(5, 256, start[-1]), start, segment_b_start, labels, note="")


def padded_batch(features):
    """The same batch as Hugging Face reads it: [B, S] and a mask."""
    index = torch.arange(features.lengths.max())[None].repeat(len(features), 1)
    mask = index < torch.from_numpy(features.lengths)[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    ids[mask] = torch.from_numpy(features.token_ids)
    segments = ((index >= torch.from_numpy(features.segment_b_start)[:, None]) & mask).long()
    return {"input_ids": ids, "attention_mask": mask.long(), "token_type_ids": segments}


def pair_of_models(name, num_outputs):
    """Ours and Hugging Face's with the same weights. The copy is strict: an export needs no renaming."""
    model = getattr(heads, name)(CONFIG, init_layout(), num_outputs)
    init_weights(model, seed=1)
    reference = getattr(transformers, name)(transformers.BertConfig(**CONFIG.to_json(), num_labels=num_outputs))
    reference.load_state_dict({key: parameter.data for key, parameter in model.named_parameters()}, strict=True)
    return model, reference


def reference_loss(name, reference, inputs, labels):
    """Hugging Face's loss and logits, [B, L], [T, L] or [T, 2]; for spans with its padding left out of the softmax."""
    mask = inputs["attention_mask"].bool()
    if name == "BertForSequenceClassification":
        output = reference(**inputs, labels=torch.from_numpy(labels))
        return output.loss, output.logits
    if name == "BertForTokenClassification":
        padded = torch.full(mask.shape, -100)
        padded[mask] = torch.from_numpy(labels)
        output = reference(**inputs, labels=padded)
        return output.loss, output.logits[mask]
    output = reference(**inputs)
    sides = [logits.masked_fill(~mask, -1e9) for logits in (output.start_logits, output.end_logits)]
    losses = [F.cross_entropy(side, torch.from_numpy(labels[:, i])) for i, side in enumerate(sides)]
    return sum(losses) / 2, torch.stack(sides, dim=-1)[mask]


@pytest.mark.parametrize("case", CASES)
def test_equal_to_hugging_face(case):
    name, loss_of, num_outputs, labels = CASES[case]
    model, reference = pair_of_models(name, num_outputs)
    features = make_features(labels)
    sequences, batch_labels = gather_batch(features, np.arange(len(LENGTHS)))
    logits = model(sequences)
    loss = loss_of(logits, batch_labels, sequences).mean()
    loss.backward()
    expected_loss, expected_logits = reference_loss(name, reference, padded_batch(features), labels)
    expected_loss.backward()

    gradients = zip(model.named_parameters(), reference.named_parameters(), strict=True)
    gradient_error = max((ours.grad - theirs.grad).abs().max().item() for (_, ours), (_, theirs) in gradients)
    errors = {
        "loss": abs(loss - expected_loss).item(),
        "logits": (logits - expected_logits).abs().max().item(),
        "gradients": gradient_error,
    }
    print(case, errors)
    assert max(errors.values()) < 1e-5  # measured: 4.8e-7 loss, 7.2e-7 logits, 1.4e-6 gradients
    assert torch.equal(logits.argmax(-1), expected_logits.argmax(-1))


def test_a_span_loss_is_hugging_faces_where_nothing_is_padded():
    model, reference = pair_of_models("BertForQuestionAnswering", 2)
    features = make_features(np.array([[2, 5], [0, 7]]), lengths=[8, 8])
    sequences, labels = gather_batch(features, np.arange(2))
    loss = heads.span_loss(model(sequences), labels, sequences).mean()
    places = {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}
    expected = reference(**padded_batch(features), **places).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_logits_of_a_sequence_do_not_depend_on_its_batch(case):
    name, loss_of, num_outputs, labels = CASES[case]
    model, _ = pair_of_models(name, num_outputs)
    features = make_features(labels)
    together, _ = gather_batch(features, np.arange(len(LENGTHS)))
    rows = split_logits(model(together), features.lengths)
    for index, row in enumerate(rows):
        alone, alone_labels = gather_batch(features, np.array([index]))
        torch.testing.assert_close(row, split_logits(model(alone), features.lengths[[index]])[0], rtol=0, atol=1e-5)
        assert torch.isfinite(loss_of(model(alone), alone_labels, alone)).all()


def test_dropout_is_a_function_of_its_seed():
    config = ModelConfig(256, 32, 1, 4, 64, max_position_embeddings=24)
    model = heads.BertForSequenceClassification(config, init_layout(), num_outputs=2)
    init_weights(model, seed=1)
    sequences, _ = gather_batch(make_features(np.zeros(4, np.int64)), np.arange(4))
    first, again, other, off = (model(sequences, seed) for seed in ((0, 1), (0, 1), (0, 2), None))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, off)
