"""The model against Hugging Face's classes, every tensor-parallel layout against one rank, and recomputation."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
import transformers

from data_prep.shards import Shards
from pretrain.data import make_batch as batch_of_records
from pretrain.data import pack_sequences
from pretrain.layout import init_layout, make_deterministic
from pretrain.model import BertForPreTraining, PretrainingBatch, init_weights, load_weights, whole_shape
from pretrain.model_config import ModelConfig, load_model_config
from tests.ranks import run_ranks

CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=64,
)
LENGTHS = [5, 64, 17, 40]  # 126 tokens: not to be divided by 4


def make_batch(lengths: list[int], config: ModelConfig, seed: int = 0) -> PretrainingBatch:
    """Random sequences of given lengths with about a seventh of the tokens predicted."""
    rng = np.random.default_rng(seed)
    lengths = np.array(lengths)
    num_tokens = lengths.sum()
    sequences = pack_sequences(rng.integers(5, config.vocab_size, num_tokens), lengths, lengths // 2)
    positions = np.sort(rng.choice(num_tokens, num_tokens // 7, replace=False))
    labels = rng.integers(5, config.vocab_size, len(positions))
    return PretrainingBatch(sequences, *map(torch.from_numpy, (positions, labels, rng.integers(0, 2, len(lengths)))))


def loss_and_gradients(
    batch: PretrainingBatch,
    config: ModelConfig,
    weights: dict | None = None,
    tensor_parallel: int = 1,
    sequence_parallel: bool = False,
    recompute: str = "none",
    dropout_seed: tuple | None = None,
):
    """(loss, whole gradients by name, hidden states) on this rank's layout; gradients are gathered over tp.

    Hidden states are those of the embeddings and of each layer, the last behind the final LayerNorm if there is one.
    """
    layout = init_layout(tensor_parallel, sequence_parallel)
    model = BertForPreTraining(config, layout, recompute)
    init_weights(model, seed=1) if weights is None else load_weights(model, weights)
    states = []
    for part in (model.bert.embeddings, *model.bert.encoder.layer[:-1], model.bert):
        part.register_forward_hook(lambda module, args, output: states.append(output.detach().numpy()))
    mlm_loss, _, pair_loss, _ = model(batch, dropout_seed)
    hidden_states = list(states)  # recomputation will call the layers again
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
    return loss.item(), gradients, hidden_states


def hugging_face_run(config: ModelConfig, batch: PretrainingBatch):
    """The same weights and batch through transformers' class of the config, padded: (weights, loss, gradients, hidden
    states of the real tokens).
    """
    torch.manual_seed(0)
    values = config.to_json()
    values |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config_class = transformers.MegatronBertConfig if config.pre_layer_norm else transformers.BertConfig
    model_class = getattr(transformers, values["architectures"][0])
    model = model_class(config_class(**values, attn_implementation="eager"))
    torch.nn.init.normal_(model.cls.predictions.bias, std=0.02)
    if config.position_embedding_type == "sinusoidal":
        table = sinusoids(config.max_position_embeddings, config.hidden_size) / np.sqrt(config.hidden_size)
        model.bert.embeddings.position_embeddings.weight.data = torch.from_numpy(table).float()
    lengths = torch.diff(batch.sequences.cu_seqlens)
    shape = (len(lengths), int(lengths.max()))
    real = torch.arange(shape[1]) < lengths[:, None]  # [B, S]
    padded = {}
    for name, tokens in (("input_ids", batch.sequences.token_ids), ("token_type_ids", batch.sequences.segment_ids)):
        padded[name] = torch.zeros(shape, dtype=torch.int64).masked_scatter(real, tokens)
    labels = torch.full((int(lengths.sum()),), -100).scatter(0, batch.masked_lm_rows, batch.masked_lm_labels)
    if config.has_pair_head:
        padded["next_sentence_label"] = batch.pair_labels
    output = model(
        **padded,
        attention_mask=real.long(),
        labels=torch.full(shape, -100).masked_scatter(real, labels),
        output_hidden_states=True,
    )
    output.loss.backward()
    parameters = dict(model.named_parameters())
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    gradients = {name: parameter.grad.numpy() for name, parameter in parameters.items()}
    return weights, output.loss.item(), gradients, [states[real].detach().numpy() for states in output.hidden_states]


def sinusoids(num_positions: int, hidden_size: int) -> np.ndarray:
    """Vaswani et al. (2017), section 3.5, entry by entry."""
    table = np.zeros((num_positions, hidden_size))
    for position in range(num_positions):
        for i in range(hidden_size // 2):
            angle = position / 10000 ** (2 * i / hidden_size)
            table[position, 2 * i], table[position, 2 * i + 1] = np.sin(angle), np.cos(angle)
    return table


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-12))


def assert_same_gradients(ours: dict, theirs: dict) -> None:
    """Within 1e-5 relative, but for the keys' bias, which has none: a constant added to all scores of a row leaves the
    softmax as it is.
    """
    assert ours.keys() == theirs.keys()
    errors = {name: relative_error(ours[name], theirs[name]) for name in theirs if "key.bias" not in name}
    assert max(errors.values()) < 1e-5, errors


def assert_equals_hugging_face(config: ModelConfig, batch: PretrainingBatch, tensor_parallel: int = 1) -> None:
    weights, loss, gradients, hidden_states = hugging_face_run(config, batch)
    ranks = run_ranks(loss_and_gradients, tensor_parallel, batch, config, weights, tensor_parallel)
    our_loss, our_gradients, our_hidden_states = ranks[0]
    assert our_loss == pytest.approx(loss, rel=1e-6)
    if config.position_embedding_type == "sinusoidal":
        del gradients["bert.embeddings.position_embeddings.weight"]
    assert_same_gradients(our_gradients, gradients)
    errors = [relative_error(*pair) for pair in zip(our_hidden_states, hidden_states, strict=True)]
    assert len(errors) == config.num_hidden_layers + 1 and max(errors) < 1e-5, errors


@pytest.mark.parametrize("lengths", [[32, 32, 32], LENGTHS], ids=["equal lengths", "unequal lengths"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"hidden_act": "gelu_new"},
        {"hidden_act": "relu"},
        {"model_type": "megatron-bert"},
        {"position_embedding_type": "sinusoidal"},
        {"pair_task": "none"},
        {"pair_task": "none", "model_type": "megatron-bert"},
    ],
    ids=lambda change: " ".join(change.values()) or "bert",
)
def test_equals_hugging_face(lengths, change):
    """Measured: loss 2.6e-7, gradients 7.8e-7, hidden states 2.1e-7 relative."""
    assert_equals_hugging_face(dataclasses.replace(CONFIG, **change), make_batch(lengths, CONFIG))


@pytest.mark.parametrize("preset", ["tiny", "mini"])
def test_a_preset_equals_hugging_face_on_real_text(preset, shard_folders):
    """A padded batch of masked pairs, as it comes from the shards."""
    shards = Shards(shard_folders[0])
    by_length = np.argsort(shards.gather(np.arange(shards.num_sequences)).lengths)
    batch = batch_of_records(shards.gather(by_length[[0, 1, 2, -2, -1]]))
    assert batch.sequences.padded_index is not None
    assert_equals_hugging_face(load_model_config(preset, shards.manifest["vocab"]["size"]), batch)


def test_equals_hugging_face_from_5_to_512_tokens():
    config = dataclasses.replace(CONFIG, max_position_embeddings=512)
    assert_equals_hugging_face(config, make_batch([5, 512, 33, 200], config))


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_what_pads_the_vocabulary_takes_no_part(tensor_parallel):
    """1000 words stand in 1024 rows; one word more in the softmax would change the loss."""
    config = dataclasses.replace(CONFIG, vocab_size=1000)
    assert config.padded_vocab_size(tensor_parallel) == 1024
    assert_equals_hugging_face(config, make_batch(LENGTHS, config), tensor_parallel)


@pytest.mark.parametrize("model_type", ["bert", "megatron-bert"])
@pytest.mark.parametrize(
    ("sequence_parallel", "recompute"),
    [(False, "none"), (False, "full"), (True, "none"), (True, "selective"), (True, "full")],
)
@pytest.mark.parametrize("tensor_parallel", [2, 4])
def test_tensor_parallel_equals_one_rank(tensor_parallel, sequence_parallel, recompute, model_type):
    """Measured: loss 7.5e-8, gradients 6.9e-7, hidden states 2e-7 relative; every rank of a group has the same loss."""
    config = dataclasses.replace(CONFIG, model_type=model_type)
    batch = make_batch(LENGTHS, config)
    ((loss, gradients, hidden_states),) = run_ranks(loss_and_gradients, 1, batch, config)
    options = (tensor_parallel, sequence_parallel, recompute)
    results = run_ranks(loss_and_gradients, tensor_parallel, batch, config, None, *options)
    assert len({result[0] for result in results}) == 1
    split_loss, split_gradients, split_hidden_states = results[0]
    assert split_loss == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(split_gradients, gradients)
    assert relative_error(split_hidden_states[-1], hidden_states[-1]) < 1e-5
    if sequence_parallel:  # what a rank holds between the layers is its share
        assert len(split_hidden_states[0]) == -(-len(hidden_states[0]) // tensor_parallel)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(("tensor_parallel", "sequence_parallel"), [(1, False), (2, True)])
def test_recomputed_gradients_are_the_same_bit_for_bit(recompute, tensor_parallel, sequence_parallel):
    """With dropout: its masks are functions, so the second forward pass draws those of the first."""
    batch, layout, seed = make_batch(LENGTHS, CONFIG), (tensor_parallel, sequence_parallel), (1, 2, 3)
    (kept, *_), (again, *_) = (
        run_ranks(loss_and_gradients, tensor_parallel, batch, CONFIG, None, *layout, kind, seed)
        for kind in ("none", recompute)
    )
    assert kept[0] == again[0]
    assert all(np.array_equal(gradient, again[1][name]) for name, gradient in kept[1].items())


def kept_bytes(recompute: str) -> int:
    """Memory of the tensors that the forward pass keeps for the backward pass, each storage once."""
    model = BertForPreTraining(CONFIG, init_layout(), recompute)
    init_weights(model, seed=1)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(make_batch([64] * 4, CONFIG), (1,))
    return sum(storage.nbytes() for address, storage in storages.items() if address not in weights)


def test_recomputing_more_keeps_less():
    (none,), (selective,), (full,) = (run_ranks(kept_bytes, 1, kind) for kind in ("none", "selective", "full"))
    assert none > selective > 2 * full


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


def test_hidden_dropout_does_not_depend_on_tensor_parallelism():
    config = dataclasses.replace(CONFIG, attention_probs_dropout_prob=0.0)
    (one, *_), (two, *_) = (
        run_ranks(loss_and_gradients, size, make_batch(LENGTHS, config), config, None, size, False, "none", (1, 2))
        for size in (1, 2)
    )
    assert two[0] == pytest.approx(one[0], rel=1e-6)
    assert_same_gradients(two[1], one[1])


def deterministic_step() -> None:
    make_deterministic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss_and_gradients(make_batch(LENGTHS, CONFIG), CONFIG, dropout_seed=(1,))
    finally:
        torch.use_deterministic_algorithms(False)


def test_every_operation_has_a_deterministic_form():
    run_ranks(deterministic_step, 1)
