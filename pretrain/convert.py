"""Checkpoint -> Hugging Face folder. The reverse needs no conversion: `pretrain.train --init-from` reads the folder."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_prep.cli import CaseOptions, option, parse, run_cli
from data_prep.files import claim_output, mark_finished, remove_leftovers, write_json
from data_prep.text.tokenizer_json import save_tokenizer, tokenizer_json
from pretrain.data import pack_sequences
from pretrain.layout import init_lone_layout
from pretrain.model import BertForPreTraining, load_weights
from pretrain.parameter_table import HEADS, tensor_table
from pretrain.weights import check_whole, missing_heads, open_weights, tokenizer_of, write_safetensors

TOLERANCE = 1e-4  # largest accepted difference; float32 sums in another order give about 1e-5


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(CaseOptions):
    """Convert a checkpoint to a Hugging Face folder: model.safetensors, config.json, tokenizer files, the vocabulary.

        python -m pretrain.convert --checkpoint RUN --output DIR

    Reads checkpoints of any tensor-parallel and ZeRO layout, Google's TensorFlow checkpoints and older Hugging Face
    folders, without a GPU and one tensor at a time. Optimizer moments are not read. At the end, the outputs of the
    folder as transformers loads it are compared with those of the checkpoint.
    """

    checkpoint: Path = option(
        "a run folder (its newest checkpoint), a checkpoint folder, a Hugging Face folder, or Google's with a"
        " bert_model.ckpt in it",
        metavar="WHERE",
    )
    output: Path = option("folder to write; empty or missing", metavar="DIR")
    vocab: Path | None = option("vocabulary, for folders without one", default=None)


@torch.no_grad()
def largest_difference(folder: Path) -> float:
    """Largest difference between transformers and our model on random ids, in hidden states and the folder's heads."""
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
    options = parse(ConvertOptions, "pretrain.convert", argv)
    weights = open_weights(options.checkpoint)
    check_whole(weights)
    missing = missing_heads(weights)
    tokenizer = tokenizer_of(weights, options.vocab, options.cased)
    tokenizer_json(tokenizer)  # raises ValueError for a vocabulary that cannot be converted
    identity = {"weights": weights.identity(), "checkpoint": weights.path.name, "vocab": tokenizer.sha256}
    if options.cased is not None:
        identity["cased"] = options.cased
    if claim_output(options.output, "pretrain.convert", identity) == "done":
        return
    unchecked = options.output / "unchecked"  # files move to the output after all checks
    unchecked.mkdir(exist_ok=True)
    remove_leftovers(unchecked)
    write_json(unchecked / "config.json", weights.config.to_json() | {"pad_token_id": tokenizer.pad_id})
    save_tokenizer(tokenizer, unchecked, weights.config.max_position_embeddings)
    write_safetensors(unchecked / "model.safetensors", weights)
    difference = largest_difference(unchecked)
    if not difference <= TOLERANCE:  # NaN fails too
        raise ValueError(
            f"{unchecked}: the converted model differs from the checkpoint by {difference:.1e}, more than {TOLERANCE}"
        )
    for path in sorted(unchecked.iterdir(), key=lambda path: path.name == "model.safetensors"):
        path.rename(options.output / path.name)
    unchecked.rmdir()
    mark_finished(options.output)
    table = tensor_table(weights.config)
    num_parameters = sum(math.prod(whole.shape) for name, whole in table.items() if name in weights)
    result = f"{num_parameters:,} parameters, outputs within {difference:.1e}"
    lacking = f"; it has no {', '.join(missing)}" if missing else ""
    print(f"{weights.path} -> {options.output}: {result}{lacking}")


if __name__ == "__main__":
    run_cli(main)
