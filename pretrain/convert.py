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
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import data_prep.tokenizer as vocabulary
from data_prep.cli import claim_output, run_cli, write_json
from pretrain.data import pack_sequences
from pretrain.layout import init_lone_layout
from pretrain.model import BertForPreTraining, load_weights
from pretrain.tensors import HEADS, tensor_table
from pretrain.weights import check_whole, missing_heads, open_weights, write_safetensors

TOLERANCE = 1e-4  # largest difference in the check; float32 and another order of sums give about 1e-5


def tokenizer_json(tokenizer: vocabulary.Tokenizer) -> Tokenizer:
    """The vocabulary as a `tokenizers` pipeline that gives the same ids and adds [CLS] and [SEP]."""
    if tokenizer.kind == "wordpiece":
        ids = {token: index for index, token in enumerate(tokenizer.tokens)}
        pipeline = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
        pipeline.normalizer = normalizers.BertNormalizer(lowercase=tokenizer.lowercase)
        pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        pipeline.decoder = decoders.WordPiece()
    else:
        pipeline = sentencepiece_json(tokenizer.path)
    special = [("[CLS]", tokenizer.cls_id), ("[SEP]", tokenizer.sep_id)]
    pipeline.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    return pipeline


def sentencepiece_json(path: Path) -> Tokenizer:
    """A SentencePiece unigram model as a `tokenizers` pipeline: its character map, then its treatment of spaces."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(Path(path).read_bytes())
    if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM:
        raise ValueError(
            f"{path}: only unigram SentencePiece models convert to Hugging Face; train with --type sentencepiece"
        )
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    pipeline = Tokenizer(models.Unigram(pieces, unk_id=model.trainer_spec.unk_id))
    steps = [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    if model.normalizer_spec.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap))
    pipeline.normalizer = normalizers.Sequence(steps)
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    pipeline.decoder = decoders.Metaspace(prepend_scheme="always")
    return pipeline


def save_tokenizer(tokenizer: vocabulary.Tokenizer, folder: Path, max_length: int) -> None:
    """Hugging Face's tokenizer files and the vocabulary file itself."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_json(tokenizer),
        model_max_length=max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],  # without it a pair is one segment
    ).save_pretrained(folder)
    tokenizer.save(folder)


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
    args = parser.parse_args(argv)
    weights = open_weights(args.checkpoint)
    check_whole(weights)
    missing = missing_heads(weights)
    tokenizer = vocabulary.load_tokenizer(weights.home)
    identity = {"weights": weights.identity(), "checkpoint": weights.path.name, "vocab": tokenizer.sha256}
    if claim_output(args.output, identity, name="convert", done_file="model.safetensors") == "done":
        return
    write_json(args.output / "config.json", weights.config.to_json() | {"pad_token_id": tokenizer.pad_id})
    save_tokenizer(tokenizer, args.output, weights.config.max_position_embeddings)
    write_safetensors(args.output / "model.safetensors", weights)
    difference = largest_difference(args.output)
    if difference > TOLERANCE:
        (args.output / "model.safetensors").rename(args.output / "model.safetensors.wrong")
        raise ValueError(
            f"{args.output}: the converted model differs from the checkpoint by {difference:.1e}, more than {TOLERANCE}"
        )
    num_parameters = sum(
        math.prod(whole.shape) for name, whole in tensor_table(weights.config).items() if name in weights
    )
    lacking = f"; it has no {', '.join(missing)}" if missing else ""
    print(f"{weights.path} -> {args.output}: {num_parameters:,} parameters, outputs within {difference:.1e}{lacking}")


if __name__ == "__main__":
    run_cli(main)
