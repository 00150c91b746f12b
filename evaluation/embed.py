"""CLI: one vector per line of text, from any checkpoint, as .npy: [CLS] of the last layer, or the mean over the tokens.

python -m evaluation.embed --checkpoint RUN --input lines.txt --output vectors.npy --pooling mean
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.cli import CaseOptions, at_least, option, parse, run_cli
from data_prep.files import finished_file
from evaluation.inference import apply_model
from evaluation.start import Start, fill_model, find_start, read_encoder
from evaluation.tasks.classification import Example
from evaluation.tasks.features import Features, encode_examples
from pretrain.layers import Sequences
from pretrain.layout import Layout, init_lone_layout
from pretrain.model import BertModel
from pretrain.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(CaseOptions):
    """Write one float32 vector per line of text, [lines, H], in the order of the lines.

    [CLS] is the hidden state before the pooler, since the pooler is trained for its pair task alone. The mean is over
    all tokens including [CLS] and [SEP], as in Reimers and Gurevych 2019.
    """

    checkpoint: str = option("a run, one of its checkpoints, or a Hugging Face folder", metavar="WHERE")
    input: Path = option("UTF-8 text; each line becomes a vector", metavar="FILE")
    output: Path = option("the .npy file to write; must not exist", metavar="FILE")
    vocab: Path | None = option("vocabulary, for folders without one", default=None)
    pooling: str = option("what the vector is made of", default="mean", choices=("cls", "mean"))
    seq_length: int = option("tokens per line; further ones are cut off", default=128, type=at_least(3))


def pool(hidden: Tensor, sequences: Sequences, pooling: str) -> Tensor:
    """[T, H] -> [B, H]: the first token of each sequence, or the mean over its tokens."""
    if pooling == "cls":
        return hidden[sequences.cu_seqlens[:-1].long()]
    parts = hidden.split(sequences.cu_seqlens.diff().tolist())
    return torch.stack([part.mean(0) for part in parts])


class SentenceVectors(nn.Module):
    """The encoder, under its name in checkpoints, followed by a pooling of its last layer."""

    def __init__(self, config: ModelConfig, layout: Layout, pooling: str):
        super().__init__()
        self.bert, self.pooling = BertModel(config, layout, add_pooling_layer=False), pooling

    def forward(self, sequences: Sequences) -> Tensor:
        """[B, H] in float32."""
        return pool(self.bert(sequences).float(), sequences, self.pooling)


def embed(start: Start, features: Features, pooling: str) -> np.ndarray:
    """One vector per sequence, [N, H] float32."""
    layout = init_lone_layout()
    model = SentenceVectors(start.config, layout, pooling)
    weights = {name: tensor for name, tensor in read_encoder(start).items() if not name.startswith("bert.pooler.")}
    fill_model(model, weights, seed=0)
    _, vectors = apply_model(model.to(layout.device), None, features, layout)
    layout.close()
    return torch.stack(vectors).numpy()


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text without their ends; ValueError for an empty file and for other bytes."""
    try:
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from error
    if lines == [""]:
        raise ValueError(f"{path} is empty; write one text per line")
    return lines


def main(argv: list[str] | None = None) -> None:
    options = parse(EmbedOptions, "evaluation.embed", argv)
    output, length = options.output, options.seq_length
    if output.suffix != ".npy" or output.exists():
        raise ValueError(f"--output {output}: choose a name that ends in .npy and does not exist yet")
    if options.checkpoint == "random":
        raise ValueError("--checkpoint random: vectors of random weights mean nothing; name a checkpoint")
    start = find_start(options.checkpoint, None, options.vocab, cased=options.cased)
    longest = start.config.max_position_embeddings
    if length > longest:
        raise ValueError(f"--seq-length {length}: the model has {longest} positions; choose at most that")
    examples = [Example(line, None, None) for line in read_lines(options.input)]
    features = encode_examples(start.tokenizer, examples, length, options.input.name)
    vectors = embed(start, features, options.pooling)
    output.parent.mkdir(parents=True, exist_ok=True)
    with finished_file(output) as file:
        np.save(file, vectors)
    print(f"{output}: {len(vectors):,} vectors of {vectors.shape[1]} ({options.pooling}; {features.note})")


if __name__ == "__main__":
    run_cli(main)
