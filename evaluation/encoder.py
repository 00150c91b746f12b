"""Where a fine-tuning starts: the newest or a named checkpoint of a pretraining run, a Hugging Face folder, or random
weights.

All that can be wrong with it is found by `find_start`, before anything is written; weights are read later, by
`read_encoder`.
"""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from data_prep.tokenizer import Tokenizer, load_tokenizer
from pretrain.checkpoint import find_checkpoint, run_folder_of
from pretrain.config import ModelConfig, load_model_config
from pretrain.convert import trimmed_tensors
from pretrain.model import init_weights, load_weights

HUGGING_FACE_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Start:
    """An encoder to start from. `weights` is a checkpoint folder, a safetensors file, or None: drawn at random from
    each seed.
    """

    weights: Path | None
    config: ModelConfig
    tokenizer: Tokenizer


def find_start(checkpoint: str, model: str | None, vocab: Path | None) -> Start:
    """Resolve `--checkpoint`: a run folder, one of its checkpoints, a Hugging Face folder, or "random" with a model and
    a vocabulary.

    Raises ValueError for a folder that is none of these, a vocabulary that is not the checkpoint's (by sha256), and
    what is missing or superfluous for the kind of start.
    """
    if checkpoint == "random":
        if model is None or vocab is None:
            raise ValueError("--checkpoint random needs --model (preset or config.json) and --vocab (file or folder)")
        tokenizer = load_tokenizer(vocab)
        return Start(None, load_model_config(model, tokenizer.vocab_size), tokenizer)
    if model is not None:
        raise ValueError(f"--model {model} goes with --checkpoint random; {checkpoint} has its own, leave --model out")
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(
            f"--checkpoint {checkpoint}: no such folder; name a pretraining run, one of its checkpoints or a "
            "Hugging Face folder, or random, majority or ngram"
        )
    is_hugging_face = (folder / HUGGING_FACE_WEIGHTS).is_file()
    weights = folder / HUGGING_FACE_WEIGHTS if is_hugging_face else find_checkpoint(folder)
    home = folder if is_hugging_face else run_folder_of(weights)
    tokenizer = load_tokenizer(home)
    if vocab is not None and load_tokenizer(vocab).sha256 != tokenizer.sha256:
        raise ValueError(
            f"--vocab {vocab} is not the vocabulary of {checkpoint}, which is {tokenizer.path.name} with sha256 "
            f"{tokenizer.sha256[:12]}...: its ids would mean other words; leave --vocab out"
        )
    return Start(weights, load_model_config(home / "config.json", tokenizer.vocab_size), tokenizer)


def read_encoder(start: Start) -> dict[str, Tensor]:
    """All `bert.*` tensors of the start, whole and float32, by Hugging Face's names; none for random weights.

    Raises ValueError if there is none: the folder holds no BERT.
    """
    if start.weights is None:
        return {}
    is_file = start.weights.is_file()
    tensors = hugging_face_tensors(start.weights) if is_file else trimmed_tensors(start.weights, start.config)
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith("bert.")}
    if "bert.embeddings.word_embeddings.weight" not in encoder:
        raise ValueError(
            f"{start.weights} holds no bert.embeddings.word_embeddings.weight: it is no checkpoint of a BERT"
        )
    return encoder


def hugging_face_tensors(path: Path) -> dict[str, Tensor]:
    """Float32 tensors of a safetensors file under today's names.

    A folder saved from `BertModel` has no prefix `bert.`; files of 2018 call LayerNorm's weight gamma and its bias
    beta, and hold the constant position_ids.
    """
    tensors = {}
    for name, tensor in load_file(path).items():
        name = name if name.startswith(("bert.", "cls.", "classifier.")) else f"bert.{name}"
        if not name.endswith("position_ids"):
            tensors[name.replace(".gamma", ".weight").replace(".beta", ".bias")] = tensor.float()
    return tensors


def fill_model(model: nn.Module, encoder: dict[str, Tensor], seed: int) -> list[str]:
    """Fill a model whose encoder is `model.bert`: from `encoder` where it has the tensor, else drawn from (seed, name).

    Returns the names that were drawn: the head, the pooler if pretraining had none, all of them for random weights.
    Raises ValueError for a tensor that the model has not, or has in another shape.
    """
    init_weights(model, seed)
    drawn = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if name not in encoder}
    if encoder:
        load_weights(model, encoder | drawn)
    return list(drawn)
