"""Reading weights by name, one tensor at a time, from a Hugging Face folder, one of our runs or checkpoints, or
Google's TensorFlow checkpoint, and writing them to a safetensors file.

`pretrain.convert` makes a Hugging Face folder, our only exchange format, from any of them. `pretrain.train --init-from`
and `evaluation.finetune --checkpoint` start from any of them.
"""

import dataclasses
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.files import finished_file, sha256_file
from data_prep.shards import safetensors_header
from data_prep.text.tokenizer import Tokenizer, load_tokenizer, same_vocabulary
from data_prep.text.vocab_files import SETTINGS_FILE, Folding, find_vocabularies
from pretrain.checkpoint_reader import CHECKSUMS, find_checkpoint, require_whole, run_folder_of, tensor_reader
from pretrain.google_checkpoint import CONFIG_FILE, find_google_checkpoint, google_readers
from pretrain.model_config import ModelConfig, load_model_config
from pretrain.parameter_table import HEADS, POSITIONS, WholeTensor, is_vocabulary, tensor_table
from pretrain.positions import sinusoidal_positions

if TYPE_CHECKING:
    from pretrain.layout import Layout

MAY_DIFFER = ("initializer_range", "pair_task")  # between weights and the model that starts from them
TIED_DECODER = "cls.predictions.decoder.weight"  # Hugging Face's second name of the word embedding


@dataclass(frozen=True)
class Weights(Mapping[str, Tensor]):
    """Whole float32 tensors under Hugging Face's names. Each is read on access and not kept."""

    path: Path  # resolved: a checkpoint folder, a Hugging Face folder, or Google's prefix
    home: Path  # the folder with the vocabulary
    config: ModelConfig
    files: tuple[Path, ...]  # whose checksums identify the weights
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
    """The weights of a Hugging Face folder, a run (its newest checkpoint), a checkpoint, or Google's folder or prefix.

    Raises ValueError if there are none, and for a file that cannot be read.
    """
    path = Path(path)
    if files := _hugging_face_files(path):
        readers = _current_names(_file_readers(files))
        _drop_tied_decoder(readers, path)
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
    files = (home / "run.json", checkpoint / "checkpoint.json")  # these determine the weights of a run
    return Weights(checkpoint, home, config, files, readers)


def check_whole(weights: Weights, layout: "Layout | None" = None) -> None:
    """Raise ValueError if a checkpoint of ours is damaged. With a layout the ranks share the work: collective."""
    if (weights.path / CHECKSUMS).is_file():
        require_whole(weights.path, layout)


def tokenizer_of(weights: Weights, vocab: Path | None = None, cased: bool | None = None) -> Tokenizer:
    """The tokenizer of the vocabulary in the weights' folder, or of `vocab` if the folder has none.

    Raises ValueError if there is neither, if the two differ, or if there are more tokens than embeddings.
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
                f"{tokenizer.sha256[:12]}...: its ids would refer to other tokens; leave --vocab out"
            )
    if weights.config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"{weights.path}: vocab_size={weights.config.vocab_size} is less than the {tokenizer.vocab_size} tokens of"
            f" {tokenizer.path.name}; it must hold every id"
        )
    return tokenizer


def start_weights(path: str | Path, config: ModelConfig, vocab_file: Path) -> Weights:
    """Weights for a model of `config` whose data has the vocabulary `vocab_file`.

    Heads that the model lacks are left out; the caller initialises heads that the weights lack. Raises ValueError for
    another shape, an incomplete encoder, superfluous tensors (by name) and another vocabulary.
    """
    weights = open_weights(path)
    for field in dataclasses.fields(config):
        there, here = getattr(weights.config, field.name), getattr(config, field.name)
        if there != here and field.name not in MAY_DIFFER and not field.name.endswith("_prob"):
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
    """The names of the head tensors of the model that `weights` lacks.

    Raises ValueError, by name, for an incomplete encoder and for tensors that do not belong to BERT.
    """
    expected = tensor_table(weights.config)
    missing = [name for name in expected if name not in weights]
    if lost := [name for name in missing if not name.startswith(HEADS)]:
        raise ValueError(f"{weights.path} lacks {len(lost)} tensors of the encoder: {', '.join(lost[:5])}")
    if extra := [name for name in weights if name not in expected and name != POSITIONS]:
        raise ValueError(f"{weights.path} has {len(extra)} tensors that do not belong to BERT: {', '.join(extra[:5])}")
    return missing


def write_safetensors(path: Path, weights: Weights) -> None:
    """Write a safetensors file atomically, with one tensor in memory at a time."""
    config = weights.config
    table = {POSITIONS: WholeTensor((config.max_position_embeddings, config.hidden_size), None)} | tensor_table(config)
    tensors = {name: (np.dtype(np.float32), table[name].shape) for name in weights}
    with finished_file(path) as file:
        file.write(safetensors_header(tensors, {"format": "pt"}))
        for name in weights:
            tensor = weights[name].contiguous()
            if tuple(tensor.shape) != table[name].shape:
                raise ValueError(f"{weights.path}: {name} is {list(tensor.shape)}, expected {list(table[name].shape)}")
            file.write(tensor.numpy().data)


def _hugging_face_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder: safetensors, whole or in parts, or else pickles."""
    patterns = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin")
    return next((found for pattern in patterns if (found := sorted(folder.glob(pattern)))), [])


def _file_readers(files: list[Path]) -> dict[str, Callable[[], Tensor]]:
    """Readers of all tensors by their names in the files; safetensors and zipped pickles are memory-mapped."""
    readers = {}
    for path in files:
        try:
            if path.suffix == ".safetensors":
                handle = safe_open(path, "pt")
                readers |= {name: partial(handle.get_tensor, name) for name in handle.keys()}  # noqa: SIM118
            else:
                mapped = zipfile.is_zipfile(path)  # files written before torch 1.6 are not zip archives
                tensors = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
                readers |= {name: partial(tensors.__getitem__, name) for name in tensors}
        except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path}: no weights can be read from it ({reason}); copy it again") from error
    return readers


def _current_names(readers: dict[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
    """The readers under the names that `BertForPreTraining` has today.

    A folder saved from `BertModel` lacks the prefix `bert.`. Files from 2018 call LayerNorm's parameters gamma and beta
    and hold the constant position_ids. The decoder's bias has two names.
    """
    prefix = "" if any(name.startswith("bert.") for name in readers) else "bert."
    changes = {".gamma": ".weight", ".beta": ".bias", "predictions.decoder.b": "predictions.b"}
    renamed = {}
    for name, reader in readers.items():
        for old, new in changes.items():
            name = name.replace(old, new)
        if not name.endswith("position_ids"):
            renamed[name if name.startswith("cls.") else prefix + name] = reader
    return renamed


def _drop_tied_decoder(readers: dict[str, Callable[[], Tensor]], path: Path) -> None:
    """Remove the decoder if it is the word embedding, as in BERT; ValueError if it is another matrix."""
    decoder = readers.pop(TIED_DECODER, None)
    if decoder and not torch.equal(decoder(), readers["bert.embeddings.word_embeddings.weight"]()):
        raise ValueError(f"{path}: {TIED_DECODER} is not the word embedding; untied decoders are not supported")


def _read_unpadded(read: Callable[[str], Tensor], name: str, vocab_size: int) -> Tensor:
    """A tensor of a checkpoint without vocabulary padding."""
    return read(name)[:vocab_size] if is_vocabulary(name) else read(name)


def _check_same_vocabulary(weights: Weights, vocab_file: Path) -> None:
    """Raise ValueError if a vocabulary in the weights' folder differs from the shards' `vocab_file`, also in folding.

    A folder without a vocabulary is accepted: the size is compared with the rest of the shape.
    """
    held, digest = find_vocabularies(weights.home), sha256_file(vocab_file)
    same = [path for path in held if sha256_file(path) == digest or _same_tokens(path, vocab_file)]
    for path in same:
        if path.suffix != ".txt" or not path.with_name(SETTINGS_FILE).is_file():
            continue  # other kinds of files say themselves how they fold text; a lone vocab.txt does not say it at all
        found, expected = load_tokenizer(path).folding, load_tokenizer(vocab_file).folding
        if found != expected:
            raise ValueError(
                f"{path} is read with {_described(found)}, but the shards were built with {_described(expected)}; build"
                f" them with --vocab {weights.home}"
            )
    if held and not same:
        raise ValueError(
            f"{held[0]} is not the vocabulary of the shards, {vocab_file.name} with sha256 {digest[:12]}...: ids"
            f" would refer to other tokens; build the shards with --vocab {weights.home}"
        )


def _described(folding: Folding) -> str:
    return f"lower_case={folding.lower_case} and strip_accents={folding.strip_accents}"


def _same_tokens(one: Path, other: Path) -> bool:
    """Whether two vocabulary files of different kinds, or two tokenizer.json, have the same tokens."""
    comparable = one.suffix != other.suffix or one.suffix == ".json"
    return comparable and same_vocabulary(load_tokenizer(one), load_tokenizer(other))
