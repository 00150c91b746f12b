"""Checkpoint -> Hugging Face folder: model.safetensors, config.json, tokenizer files, the vocabulary, and a check that
both agree.

    python -m pretrain.convert --checkpoint RUN_OR_CHECKPOINT --output DIR

Reads a checkpoint of any tensor-parallel and ZeRO layout without a GPU, one tensor at a time; the optimizer's moments
are never read. Google's TensorFlow checkpoints and older Hugging Face folders come in the same way. The other direction
needs no conversion: `pretrain.train --init-from` starts from a Hugging Face folder as it is.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch

from data_prep.cli import run_cli
from data_prep.files import claim_output, mark_finished, remove_leftovers, write_json
from data_prep.text.tokenizer import add_case_arguments
from data_prep.text.tokenizer_json import save_tokenizer, tokenizer_json
from pretrain.data import pack_sequences
from pretrain.layout import init_lone_layout
from pretrain.model import BertForPreTraining, load_weights
from pretrain.parameter_table import HEADS, tensor_table
from pretrain.weights import check_whole, missing_heads, open_weights, tokenizer_of, write_safetensors

TOLERANCE = 1e-4  # largest difference in the check; float32 and another order of sums give about 1e-5


@torch.no_grad()
def largest_difference(folder: Path) -> float:
    """Largest difference between the saved folder as transformers loads it and our model, on random ids: of the hidden
    states, and of both heads' logits where the folder has heads.
    """
    from transformers import AutoModelForPreTraining

    weights = open_weights(folder)
    config = weights.config
    ours = BertForPreTraining(config, init_lone_layout())
    drawn = load_weights(ours, weights, optional=HEADS)
    theirs = AutoModelForPreTraining.from_pretrained(folder).eval()
    rng = np.random.default_rng(0)
    longest = min(64, config.max_position_embeddings)
    ids = rng.integers(0, config.vocab_size, (4, longest))
    sequences = pack_sequences(ids.reshape(-1), np.full(4, longest), np.full(4, longest // 2))
    hidden = ours.bert(sequences)  # [T, H]
    segments = sequences.segment_ids.view(4, longest)
    outputs = theirs(input_ids=torch.from_numpy(ids), token_type_ids=segments, output_hidden_states=True)
    pairs = [(outputs.hidden_states[-1], hidden)]
    if not any(name.startswith("cls.predictions") for name in drawn):
        logits = ours.cls.predictions(hidden, ours.bert.embeddings.word_embeddings.weight)
        pairs.append((outputs.prediction_logits, logits[:, : config.vocab_size]))
    if config.has_pair_head and not drawn:
        pair_logits = ours.cls.seq_relationship(ours.bert.pool(hidden, sequences.cu_seqlens))
        pairs.append((outputs.seq_relationship_logits, pair_logits))
    return max((theirs - ours.view_as(theirs)).abs().max().item() for theirs, ours in pairs)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="pretrain.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        help="a run folder (its newest checkpoint), a checkpoint folder, a Hugging Face folder, or Google's with a"
        " bert_model.ckpt in it",
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to write; empty or missing")
    parser.add_argument("--vocab", type=Path, metavar="FILE", help="vocabulary, for folders without one")
    add_case_arguments(parser)
    args = parser.parse_args(argv)
    weights = open_weights(args.checkpoint)
    check_whole(weights)
    missing = missing_heads(weights)
    tokenizer = tokenizer_of(weights, args.vocab, args.cased)
    tokenizer_json(tokenizer)  # a vocabulary that does not convert is refused before anything is written
    identity = {"weights": weights.identity(), "checkpoint": weights.path.name, "vocab": tokenizer.sha256}
    identity |= {} if args.cased is None else {"cased": args.cased}
    if claim_output(args.output, "pretrain.convert", identity) == "done":
        return
    unchecked = args.output / "unchecked"  # what has not passed every check has no final name
    unchecked.mkdir(exist_ok=True)
    remove_leftovers(unchecked)
    write_json(unchecked / "config.json", weights.config.to_json() | {"pad_token_id": tokenizer.pad_id})
    save_tokenizer(tokenizer, unchecked, weights.config.max_position_embeddings)
    write_safetensors(unchecked / "model.safetensors", weights)
    difference = largest_difference(unchecked)
    if not difference <= TOLERANCE:  # NaN is not
        raise ValueError(
            f"{unchecked}: the converted model differs from the checkpoint by {difference:.1e}, more than {TOLERANCE}"
        )
    for path in sorted(unchecked.iterdir(), key=lambda path: path.name == "model.safetensors"):
        path.rename(args.output / path.name)
    unchecked.rmdir()
    mark_finished(args.output)
    num_parameters = sum(
        math.prod(whole.shape) for name, whole in tensor_table(weights.config).items() if name in weights
    )
    lacking = f"; it has no {', '.join(missing)}" if missing else ""
    print(f"{weights.path} -> {args.output}: {num_parameters:,} parameters, outputs within {difference:.1e}{lacking}")


if __name__ == "__main__":
    run_cli(main)
