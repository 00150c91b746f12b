"""Weights by name, from wherever they lie, one tensor in memory at a time: a Hugging Face folder, a run or checkpoint
of ours, Google's TensorFlow checkpoint. And their way back into a safetensors file.

A Hugging Face folder is what programs exchange, so there is no second format of ours: `pretrain.convert` makes one from
all three, `pretrain.train --init-from` and `evaluation.finetune --checkpoint` start from any of them.
"""

import dataclasses
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.files import finished_file, sha256_file
from data_prep.shards import safetensors_header
from data_prep.text.tokenizer import Tokenizer, load_tokenizer, same_vocabulary
from data_prep.text.vocab_files import find_vocabularies
from pretrain.checkpoint_reader import CHECKSUMS, find_checkpoint, require_whole, run_folder_of, tensor_reader
from pretrain.google_checkpoint import CONFIG_FILE, find_google_checkpoint, google_readers
from pretrain.layout import Layout
from pretrain.model import sinusoidal_positions
from pretrain.model_config import ModelConfig, load_model_config
from pretrain.parameter_table import HEADS, POSITIONS, TensorShape, is_vocabulary, tensor_table

FREE = ("initializer_range", "pair_task")  # what may change with the training data and the start
TIED_DECODER = "cls.predictions.decoder.weight"  # Hugging Face's second name of the word embedding


@dataclass(frozen=True)
class Weights(Mapping[str, Tensor]):
    """Whole float32 tensors under Hugging Face's names; each is read when it is asked for, and not kept."""

    path: Path  # what the user named, made precise: a checkpoint folder, a Hugging Face folder, Google's prefix
    home: Path  # the folder with the vocabulary
    config: ModelConfig
    files: tuple[Path, ...]  # by whose bytes the weights are known
    readers: dict[str, Callable[[], Tensor]]

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.readers[name]().float()
        if not tensor.isfinite().all():
            raise ValueError(f"{self.path}: {name} has values that are NaN or infinite; take an earlier checkpoint")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)

    def identity(self) -> dict[str, str]:
        """File name -> sha256."""
        return {path.name: sha256_file(path) for path in self.files}


def open_weights(path: str | Path) -> Weights:
    """Weights of a Hugging Face folder, a run (its newest checkpoint), a checkpoint folder, or Google's folder or
    `bert_model.ckpt`.

    Raises ValueError where there are none, and for a file that cannot be read.
    """
    path = Path(path)
    if files := hugging_face_files(path):
        readers = our_names(_file_readers(files))
        _check_tied(readers, path)
        return Weights(path, path, load_model_config(path / "config.json"), tuple(files), readers)
    if prefix := find_google_checkpoint(path):
        config = load_model_config(prefix.parent / CONFIG_FILE)
        index = prefix.with_name(prefix.name + ".index")  # it holds a checksum of every tensor
        return Weights(prefix, prefix.parent, config, (index,), google_readers(prefix, tensor_table(config)))
    checkpoint = find_checkpoint(path)
    home = run_folder_of(checkpoint)
    config = load_model_config(home / "config.json")
    names, read = tensor_reader(checkpoint)
    readers = {name: partial(_read_unpadded, read, name, config.vocab_size) for name in names}
    if config.position_embedding_type == "sinusoidal":
        readers[POSITIONS] = partial(sinusoidal_positions, config.max_position_embeddings, config.hidden_size)
    files = (home / "run.json", checkpoint / "checkpoint.json")  # a run's weights are a function of these
    return Weights(checkpoint, home, config, files, readers)


def check_whole(weights: Weights, layout: Layout | None = None) -> None:
    """Raises ValueError if these are weights of a checkpoint of ours whose files are damaged; with a layout the ranks
    share the work.
    """
    if (weights.path / CHECKSUMS).is_file():
        require_whole(weights.path, layout)


def tokenizer_of(weights: Weights, vocab: Path | None = None, cased: bool | None = None) -> Tokenizer:
    """The vocabulary that lies beside the weights, or `vocab` where there is none.

    Raises ValueError where there is neither, for a `vocab` that is not the one beside them, and for more tokens than
    the model has embeddings.
    """
    held = find_vocabularies(weights.home)
    given = None if vocab is None else load_tokenizer(vocab, cased)
    if given and (not held or any(given.path.samefile(path) for path in held)):
        tokenizer = given
    else:
        tokenizer = load_tokenizer(weights.home, cased)
        if given and not same_vocabulary(given, tokenizer):
            raise ValueError(
                f"--vocab {vocab} is not the vocabulary of {weights.path}, which is {tokenizer.path.name} with sha256 "
                f"{tokenizer.sha256[:12]}...: its ids would mean other words; leave --vocab out"
            )
    if weights.config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"{weights.path}: vocab_size={weights.config.vocab_size} is less than the {tokenizer.vocab_size} tokens of"
            f" {tokenizer.path.name}; it must hold every id"
        )
    return tokenizer


def _read_unpadded(read: Callable[[str], Tensor], name: str, vocab_size: int) -> Tensor:
    """A tensor of a checkpoint without the rows that pad the vocabulary."""
    return read(name)[:vocab_size] if is_vocabulary(name) else read(name)


def hugging_face_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder: safetensors, whole or in parts, or else pytorch_model.bin."""
    patterns = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin")
    return next((found for pattern in patterns if (found := sorted(folder.glob(pattern)))), [])


def _file_readers(files: list[Path]) -> dict[str, Callable[[], Tensor]]:
    """Readers of all tensors of weight files under the names there; safetensors and zipped pickles are mapped."""
    readers = {}
    for path in files:
        try:
            if path.suffix == ".safetensors":
                handle = safe_open(path, "pt")
                readers |= {name: partial(handle.get_tensor, name) for name in handle.keys()}  # noqa: SIM118
            else:
                mapped = zipfile.is_zipfile(path)  # files older than torch 1.6 are no zip archives
                tensors = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
                readers |= {name: partial(tensors.__getitem__, name) for name in tensors}
        except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path}: no weights can be read from it ({reason}); copy it again") from error
    return readers


def our_names(readers: dict) -> dict:
    """The same values under today's names of `BertForPreTraining`.

    A folder saved from `BertModel` has no prefix `bert.`; files of 2018 call LayerNorm's weight gamma and its bias
    beta, and hold the constant position_ids; the decoder's bias has two names.
    """
    prefix = "" if any(name.startswith("bert.") for name in readers) else "bert."
    renamed = {}
    for name, value in readers.items():
        if name.endswith("position_ids"):
            continue
        name = (
            name.replace(".gamma", ".weight")
            .replace(".beta", ".bias")
            .replace("predictions.decoder.b", "predictions.b")
        )
        renamed[name if name.startswith("cls.") else prefix + name] = value
    return renamed


def _check_tied(readers: dict[str, Callable[[], Tensor]], path: Path) -> None:
    """Drops the decoder if it is the word embedding, as in BERT; ValueError if it is another matrix."""
    decoder = readers.pop(TIED_DECODER, None)
    if decoder and not torch.equal(decoder(), readers["bert.embeddings.word_embeddings.weight"]()):
        raise ValueError(f"{path}: {TIED_DECODER} is not the word embedding; an untied decoder is not built here")


def start_weights(path: str | Path, config: ModelConfig, vocab_file: Path) -> Weights:
    """Weights for a model of `config` whose data has the vocabulary `vocab_file`.

    Heads that the model has not are left away; heads that the weights have not are drawn by the caller. Raises
    ValueError for weights of another shape, an encoder that is not complete, tensors left over, by name, and another
    vocabulary.
    """
    weights = open_weights(path)
    for field in dataclasses.fields(config):
        there, here = getattr(weights.config, field.name), getattr(config, field.name)
        if there != here and field.name not in FREE and not field.name.endswith("_prob"):
            raise ValueError(
                f"{path} has {field.name}={there}, the model has {here}; give the weights' own config to --model"
            )
    _check_same_vocabulary(weights, vocab_file)
    expected = tensor_table(config)
    readers = {name: read for name, read in weights.readers.items() if name in expected or not name.startswith(HEADS)}
    weights = dataclasses.replace(weights, config=config, readers=readers)
    missing_heads(weights)
    return weights


def missing_heads(weights: Weights) -> list[str]:
    """Names of the head tensors that its model has and `weights` has not.

    Raises ValueError by name for an encoder that is not complete and for tensors that are no part of BERT.
    """
    expected = tensor_table(weights.config)
    missing = [name for name in expected if name not in weights]
    if lost := [name for name in missing if not name.startswith(HEADS)]:
        raise ValueError(f"{weights.path} lacks {len(lost)} tensors of the encoder: {', '.join(lost[:5])}")
    if extra := [name for name in weights if name not in expected and name != POSITIONS]:
        raise ValueError(f"{weights.path} has {len(extra)} tensors that BERT has not: {', '.join(extra[:5])}")
    return missing


def _check_same_vocabulary(weights: Weights, vocab_file: Path) -> None:
    """Raises ValueError unless a vocabulary beside the weights is the shards' `vocab_file`.

    Folders without a vocabulary file are taken as they are: their size is compared with the rest of the shape.
    """
    held, digest = find_vocabularies(weights.home), sha256_file(vocab_file)
    if held and not any(sha256_file(path) == digest or _same_tokens(path, vocab_file) for path in held):
        raise ValueError(
            f"{held[0]} is not the vocabulary of the shards, {vocab_file.name} with sha256 {digest[:12]}...: ids"
            f" would mean other words; build the shards with --vocab {weights.home}"
        )


def _same_tokens(one: Path, other: Path) -> bool:
    """Whether two vocabulary files of different kinds, or two tokenizer.json, have the same tokens."""
    comparable = one.suffix != other.suffix or one.suffix == ".json"
    return comparable and same_vocabulary(load_tokenizer(one), load_tokenizer(other))


def write_safetensors(path: Path, weights: Weights) -> None:
    """Write the weights as a safetensors file with one tensor in memory at a time; whole or not at all."""
    config = weights.config
    table = {POSITIONS: TensorShape((config.max_position_embeddings, config.hidden_size), None)} | tensor_table(config)
    tensors = {name: (np.dtype(np.float32), table[name].shape) for name in weights}
    with finished_file(path) as file:
        file.write(safetensors_header(tensors, {"format": "pt"}))
        for name in weights:
            tensor = weights[name].contiguous()
            if tuple(tensor.shape) != table[name].shape:
                raise ValueError(f"{weights.path}: {name} is {list(tensor.shape)}, expected {list(table[name].shape)}")
            file.write(tensor.numpy().data)
