"""CLI: one vector a line of text, from any checkpoint, as .npy: [CLS] of the last layer, or the mean over the tokens.

    python -m evaluation.embed --checkpoint RUN --input lines.txt --output vectors.npy --pooling mean

The vectors are float32 [lines, H], in the order of the lines. [CLS] is the hidden state before the pooler, which is
trained for its pair task alone; the mean is over all tokens with [CLS] and [SEP], as in Reimers and Gurevych 2019.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.cli import run_cli
from data_prep.files import finished_file
from data_prep.text.tokenizer import add_case_arguments
from evaluation.predict import apply_model
from evaluation.start import Start, fill_model, find_start, read_encoder
from evaluation.tasks.classification import Example
from evaluation.tasks.features import Features, encode_examples
from pretrain.layers import Sequences
from pretrain.layout import Layout, init_lone_layout
from pretrain.model import BertModel
from pretrain.model_config import ModelConfig

POOLINGS = ("cls", "mean")


def pool(hidden: Tensor, sequences: Sequences, pooling: str) -> Tensor:
    """[T, H] -> [B, H]: the first token of each sequence, or the mean over its tokens."""
    if pooling == "cls":
        return hidden[sequences.cu_seqlens[:-1].long()]
    parts = hidden.split(sequences.cu_seqlens.diff().tolist())
    return torch.stack([part.mean(0) for part in parts])


class SentenceVectors(nn.Module):
    """The encoder alone, under the name that checkpoints give it, and what is taken of its last layer."""

    def __init__(self, config: ModelConfig, layout: Layout, pooling: str):
        super().__init__()
        self.bert, self.pooling = BertModel(config, layout, add_pooling_layer=False), pooling

    def forward(self, sequences: Sequences) -> Tensor:
        """[B, H] in float32."""
        return pool(self.bert(sequences).float(), sequences, self.pooling)


def embed(start: Start, features: Features, pooling: str) -> np.ndarray:
    """[N, H] float32 A vector for each sequence."""
    layout = init_lone_layout()
    model = SentenceVectors(start.config, layout, pooling)
    weights = {name: tensor for name, tensor in read_encoder(start).items() if not name.startswith("bert.pooler.")}
    fill_model(model, weights, seed=0)
    _, vectors = apply_model(model.to(layout.device), None, features, layout)
    layout.close()
    return torch.stack(vectors).numpy()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a run, one of its checkpoints, or a Hugging Face folder")
    parser.add_argument("--vocab", type=Path, metavar="FILE", help="vocabulary, for folders without one")
    add_case_arguments(parser)
    parser.add_argument("--input", required=True, type=Path, help="UTF-8 text, a line a vector")
    parser.add_argument("--output", required=True, type=Path, help="the .npy file to write; must not exist")
    parser.add_argument("--pooling", choices=POOLINGS, default="mean", help="default: %(default)s")
    parser.add_argument("--max-seq-length", type=int, default=128, metavar="N", help="tokens (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.output.suffix != ".npy" or args.output.exists():
        raise ValueError(f"--output {args.output}: a name that ends in .npy and does not exist yet is due")
    if args.checkpoint == "random":
        raise ValueError("--checkpoint random: random weights say nothing of a text; name a checkpoint")
    start = find_start(args.checkpoint, None, args.vocab, cased=args.cased)
    longest = start.config.max_position_embeddings
    if not 3 <= args.max_seq_length <= longest:
        raise ValueError(f"--max-seq-length {args.max_seq_length}: the model has {longest} positions; choose 3 to that")
    try:
        lines = args.input.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{args.input}: byte {error.start} is no UTF-8 text; convert the file to UTF-8") from error
    if lines == [""]:
        raise ValueError(f"{args.input} is empty; write a text a line")
    examples = [Example(line.removesuffix("\r"), None, None) for line in lines]
    features = encode_examples(start.tokenizer, examples, args.max_seq_length, args.input.name)
    vectors = embed(start, features, args.pooling)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with finished_file(args.output) as file:
        np.save(file, vectors)
    print(f"{args.output}: {len(vectors):,} vectors of {vectors.shape[1]} ({args.pooling}; {features.note})")


if __name__ == "__main__":
    run_cli(main)
