"""The model against Hugging Face's `BertForPreTraining`, and every tensor-parallel layout against one rank."""

import numpy as np
import pytest
import torch
from transformers import BertConfig
from transformers import BertForPreTraining as HuggingFaceBert

from pretrain.config import ModelConfig
from pretrain.data import pack_sequences
from pretrain.layout import init_layout
from pretrain.model import BertForPreTraining, PretrainingBatch, init_weights, load_weights, whole_shape
from tests.ranks import run_ranks

CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=64,
)


def make_batch(lengths: list[int], config: ModelConfig, seed: int = 0) -> PretrainingBatch:
    """Random sequences of given lengths with about a seventh of the tokens predicted."""
    rng = np.random.default_rng(seed)
    lengths = np.array(lengths)
    num_tokens = lengths.sum()
    sequences = pack_sequences(rng.integers(5, config.vocab_size, num_tokens), lengths, lengths // 2)
    positions = np.sort(rng.choice(num_tokens, num_tokens // 7, replace=False))
    labels = rng.integers(5, config.vocab_size, len(positions))
    return PretrainingBatch(sequences, *map(torch.from_numpy, (positions, labels, rng.integers(0, 2, len(lengths)))))


def loss_and_gradients(tensor_parallel: int, lengths: list[int], config: ModelConfig, tensors: dict | None = None):
    """(loss, whole gradients by name, hidden states) on this rank's layout; gradients are gathered over tp."""
    layout = init_layout(tensor_parallel)
    model = BertForPreTraining(config, layout)
    init_weights(model, seed=1) if tensors is None else load_weights(model, tensors)
    batch = make_batch(lengths, config)
    mlm_loss, _, pair_loss, _ = model(batch)
    loss = mlm_loss.mean() + pair_loss.mean()
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if getattr(parameter, "tensor_model_parallel", False):
            parts = [torch.empty_like(gradient) for _ in range(tensor_parallel)]
            torch.distributed.all_gather(parts, gradient, group=layout.get_model_parallel_group())
            gradient = torch.cat(parts, parameter.partition_dim)
            gradient = gradient.narrow(0, 0, whole_shape(parameter, name, config, layout)[0])
        gradients[name] = gradient.numpy()
    return loss.item(), gradients, model.bert(batch.sequences).detach().numpy()


def hugging_face_run(config: ModelConfig, lengths: list[int]):
    """The same weights and batch through transformers, padded: (weights, loss, gradients, hidden states of the real
    tokens).
    """
    torch.manual_seed(0)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "vocab_size": config.vocab_size}
    model = HuggingFaceBert(BertConfig(**{**config.to_json(), **no_dropout}, attn_implementation="eager"))
    torch.nn.init.normal_(model.cls.predictions.bias, std=0.02)
    batch = make_batch(lengths, config)
    shape = (len(lengths), max(lengths))
    real = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]  # [B, S]
    padded = {}
    for name, values in (("input_ids", batch.sequences.token_ids), ("token_type_ids", batch.sequences.segment_ids)):
        padded[name] = torch.zeros(shape, dtype=torch.int64).masked_scatter(real, values)
    labels = torch.full((int(sum(lengths)),), -100).scatter(0, batch.masked_lm_positions, batch.masked_lm_labels)
    output = model(
        **padded,
        attention_mask=real.long(),
        labels=torch.full(shape, -100).masked_scatter(real, labels),
        next_sentence_label=batch.pair_labels,
        output_hidden_states=True,
    )
    output.loss.backward()
    parameters = dict(model.named_parameters())
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    gradients = {name: parameter.grad.numpy() for name, parameter in parameters.items()}
    return weights, output.loss.item(), gradients, output.hidden_states[-1][real].detach().numpy()


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-12))


@pytest.mark.parametrize("lengths", [[32, 32, 32], [5, 64, 17, 40]], ids=["equal lengths", "unequal lengths"])
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu"])
def test_equals_hugging_face(lengths, hidden_act):
    """Measured: loss 1.2e-7, gradients 2e-6, hidden states 1e-6 relative."""
    config = ModelConfig(**{**CONFIG.__dict__, "hidden_act": hidden_act})
    weights, loss, gradients, hidden = hugging_face_run(config, lengths)
    ((our_loss, our_gradients, our_hidden),) = run_ranks(loss_and_gradients, 1, 1, lengths, config, weights)
    assert our_loss == pytest.approx(loss, rel=1e-6)
    assert our_gradients.keys() == gradients.keys()
    # The keys' bias has no gradient: a constant added to all scores of a row leaves the softmax as it is.
    errors = {
        name: relative_error(our_gradients[name], gradients[name]) for name in gradients if "key.bias" not in name
    }
    assert max(errors.values()) < 1e-5, errors
    assert relative_error(our_hidden, hidden) < 1e-5


@pytest.mark.parametrize("tensor_parallel", [2, 4])
def test_tensor_parallel_equals_one_rank(tensor_parallel):
    """Measured: loss 1.5e-7, gradients 3e-6 relative; every rank of a group has the same loss."""
    lengths = [5, 64, 17, 40]
    ((loss, gradients, hidden),) = run_ranks(loss_and_gradients, 1, 1, lengths, CONFIG)
    results = run_ranks(loss_and_gradients, tensor_parallel, tensor_parallel, lengths, CONFIG)
    assert len({result[0] for result in results}) == 1
    split_loss, split_gradients, split_hidden = results[0]
    assert split_loss == pytest.approx(loss, rel=1e-6)
    errors = {
        name: relative_error(split_gradients[name], gradients[name]) for name in gradients if "key.bias" not in name
    }
    assert max(errors.values()) < 1e-5, errors
    assert relative_error(split_hidden, hidden) < 1e-5


def initial_weights(tensor_parallel: int) -> dict[str, np.ndarray]:
    layout = init_layout(tensor_parallel)
    model = BertForPreTraining(CONFIG, layout)
    init_weights(model, seed=7)
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def test_initial_weights_do_not_depend_on_the_layout():
    (whole,) = run_ranks(initial_weights, 1, 1)
    slices = run_ranks(initial_weights, 2, 2)
    for name, tensor in whole.items():
        parts = [part[name] for part in slices]
        if parts[0].shape == tensor.shape:
            assert all(np.array_equal(part, tensor) for part in parts), name
        else:
            dim = next(i for i, (a, b) in enumerate(zip(parts[0].shape, tensor.shape, strict=True)) if a != b)
            joined = np.concatenate(parts, dim)
            assert np.array_equal(joined.take(range(min(joined.shape[dim], tensor.shape[dim])), dim), tensor), name


def dropout_runs() -> list[float]:
    layout = init_layout(1)
    model = BertForPreTraining(CONFIG, layout)
    init_weights(model, seed=1)
    batch = make_batch([20, 30], CONFIG)
    return [model(batch, seed)[0].sum().item() for seed in (None, (1, 0, 0, 0), (1, 0, 0, 0), (1, 1, 0, 0))]


def test_dropout_is_a_function_of_its_seed():
    (without, first, again, other), = run_ranks(dropout_runs, 1)  # fmt: skip
    assert first == again
    assert len({without, first, other}) == 3
