"""The weights that fine-tuning starts from: a checkpoint of a pretraining run, a Hugging Face folder, or random ones.

`find_start` checks them before anything is written; `read_encoder` reads them later.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from data_prep.text.tokenizer import Tokenizer, load_tokenizer
from pretrain.model import init_weights, load_weights
from pretrain.model_config import ModelConfig, load_model_config
from pretrain.weights import Weights, check_whole, open_weights, tokenizer_of

EMBEDDINGS = tuple(f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type"))


@dataclass(frozen=True)
class Start:
    """The encoder to start from. If `weights` is None, each seed draws its own initial weights."""

    weights: Weights | None
    config: ModelConfig
    tokenizer: Tokenizer


def find_start(
    checkpoint: str,
    model: str | None,
    vocab: Path | None,
    dropout: float | None = None,
    cased: bool | None = None,
) -> Start:
    """Resolve `--checkpoint`: a run folder, one of its checkpoints, a Hugging Face folder, or "random".

    Only "random" takes a `model`, a preset or config.json. "random" and folders without a vocabulary need `vocab`.
    `dropout` replaces the model's, and `cased` is passed to `load_tokenizer`. Raises ValueError for any other folder, a
    vocabulary that is not the checkpoint's, and an argument that is missing or not allowed.
    """
    if checkpoint == "random":
        if model is None or vocab is None:
            raise ValueError("--checkpoint random needs --model (preset or config.json) and --vocab (file or folder)")
        tokenizer = load_tokenizer(vocab, cased)
        return Start(None, load_model_config(model, tokenizer.vocab_size).with_dropout(dropout), tokenizer)
    if model is not None:
        raise ValueError(f"--model {model} goes with --checkpoint random; {checkpoint} has its own, leave --model out")
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(
            f"--checkpoint {checkpoint}: no such folder; name a pretraining run, one of its checkpoints or a "
            "Hugging Face folder, or random, majority or ngram"
        )
    weights = open_weights(folder)
    check_whole(weights)
    tokenizer = tokenizer_of(weights, vocab, cased)
    return Start(weights, weights.config.with_dropout(dropout), tokenizer)


def read_encoder(start: Start) -> dict[str, Tensor]:
    """Unsharded float32 `bert.*` tensors by Hugging Face name; {} for random weights, ValueError if there are none."""
    if start.weights is None:
        return {}
    encoder = {name: start.weights[name] for name in start.weights if name.startswith("bert.")}
    if "bert.embeddings.word_embeddings.weight" not in encoder:
        raise ValueError(
            f"{start.weights.path} holds no bert.embeddings.word_embeddings.weight, so it is not a checkpoint of a BERT"
        )
    return encoder


def rescale_embeddings(encoder: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Multiply the three embedding tables by one factor that makes the word embeddings as large as freshly initialized
    ones. The encoder still computes the same function, because a LayerNorm follows the sum of the embeddings.

    LAMB's steps are proportional to the weights, so large steps make the weights grow. AdamW's steps are not, and would
    move such weights too little. Raises ValueError for a model without that LayerNorm, and for sinusoidal positions.
    """
    if config.pre_layer_norm:
        raise ValueError("--rescale-embeddings: this model has no LayerNorm after its embeddings; leave it out")
    if config.position_embedding_type == "sinusoidal":
        raise ValueError("--rescale-embeddings: sinusoidal positions are not scaled with the words; leave it out")
    factor = config.initializer_range / encoder["bert.embeddings.word_embeddings.weight"].std()
    return {name: tensor * factor if name in EMBEDDINGS else tensor for name, tensor in encoder.items()}


def fill_model(model: nn.Module, encoder: dict[str, Tensor], seed: int) -> list[str]:
    """Load `encoder` into a model whose encoder is `model.bert`, and draw all other tensors from (seed, name).

    Returns the names of the drawn tensors: the head, the pooler if `encoder` has none, or everything for random
    weights. A pooler that the model lacks is ignored. Raises ValueError for any other tensor that the model lacks or
    has in another shape.
    """
    init_weights(model, seed)
    parameters = dict(model.named_parameters())
    encoder = {name: encoder[name] for name in encoder if name in parameters or not name.startswith("bert.pooler.")}
    drawn = {name: tensor.detach().clone() for name, tensor in parameters.items() if name not in encoder}
    if encoder:
        load_weights(model, encoder | drawn)
    return list(drawn)
