"""Checkpoint -> Hugging Face folder: model.safetensors, config.json, tokenizer files, the vocabulary, and a check that
both agree.

    python -m pretrain.convert --checkpoint RUN_OR_CHECKPOINT --output DIR

Reads a checkpoint of any tensor-parallel and ZeRO layout, without a GPU and without the optimizer's moments in memory.
Our parameters already have Hugging Face's names, so a conversion merges slices and cuts the rows that pad the
vocabulary.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

import data_prep.tokenizer as vocabulary
from data_prep.cli import claim_output, run_cli, sha256_file, write_json
from pretrain.checkpoint import find_checkpoint, read_tensors, run_folder_of
from pretrain.config import ModelConfig, load_model_config
from pretrain.data import pack_sequences
from pretrain.layout import init_layout
from pretrain.model import BertForPreTraining, load_weights, sinusoidal_positions

TOLERANCE = 1e-4  # largest difference of a hidden state in the check; float32 and another order of sums give about 5e-6


def trimmed_tensors(checkpoint: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Whole float32 weights by name, without the rows that pad the vocabulary, with positions that are no weights."""
    tensors = {}
    for name, tensor in read_tensors(checkpoint):
        in_vocabulary = name.endswith(("word_embeddings.weight", "predictions.bias"))
        tensors[name] = tensor[: config.vocab_size].clone() if in_vocabulary else tensor.contiguous()
    if config.position_embedding_type == "sinusoidal":
        table = sinusoidal_positions(config.max_position_embeddings, config.hidden_size)
        tensors["bert.embeddings.position_embeddings.weight"] = table
    return tensors


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
    ).save_pretrained(folder)
    tokenizer.save(folder)


@torch.no_grad()
def largest_difference(folder: Path, tensors: dict[str, Tensor], config: ModelConfig) -> float:
    """Largest difference of a hidden state between the saved folder, as transformers loads it, and our model, on random
    ids.
    """
    from transformers import AutoModelForPreTraining

    layout = init_layout()
    ours = BertForPreTraining(config, layout)
    load_weights(ours, tensors)
    theirs = AutoModelForPreTraining.from_pretrained(folder).eval()
    rng = np.random.default_rng(0)
    longest = min(64, config.max_position_embeddings)
    ids = rng.integers(0, config.vocab_size, (4, longest))
    sequences = pack_sequences(ids.reshape(-1), np.full(4, longest), np.full(4, longest // 2))
    hidden = ours.bert(sequences).view(4, longest, -1)
    segments = sequences.segment_ids.view(4, longest)
    outputs = theirs(input_ids=torch.from_numpy(ids), token_type_ids=segments, output_hidden_states=True)
    return (outputs.hidden_states[-1] - hidden).abs().max().item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="pretrain.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", required=True, type=Path, help="a run folder (its newest checkpoint) or a checkpoint folder"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to write; empty or missing")
    args = parser.parse_args(argv)
    checkpoint = find_checkpoint(args.checkpoint)
    run_folder = run_folder_of(checkpoint)
    config = load_model_config(run_folder / "config.json")
    tokenizer = vocabulary.load_tokenizer(run_folder)
    identity = {"checkpoint": checkpoint.name, "run": sha256_file(run_folder / "run.json"), "vocab": tokenizer.sha256}
    if claim_output(args.output, identity, name="convert", done_file="model.safetensors") == "done":
        return
    tensors = trimmed_tensors(checkpoint, config)
    write_json(args.output / "config.json", config.to_json() | {"pad_token_id": tokenizer.pad_id})
    save_tokenizer(tokenizer, args.output, config.max_position_embeddings)
    partial = args.output / "model.safetensors.tmp"
    save_file(tensors, partial, metadata={"format": "pt"})
    shutil.move(partial, args.output / "model.safetensors")
    difference = largest_difference(args.output, tensors, config)
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    print(
        f"{checkpoint} -> {args.output}: {num_parameters:,} parameters; hidden states within {difference:.1e} of ours"
    )
    if difference > TOLERANCE:
        (args.output / "model.safetensors").rename(args.output / "model.safetensors.wrong")
        raise ValueError(
            f"{args.output}: the converted model differs from the checkpoint by {difference:.1e}, more than {TOLERANCE}"
        )


if __name__ == "__main__":
    run_cli(main)
