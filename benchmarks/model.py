"""Forward and backward of our model beside transformers' `BertForPreTraining` with SDPA: same weights, same batches of
real text, in turn, in one process.

    python -m benchmarks.model --data SHARDS --model base

Ours computes no padding and predicts at the masked positions alone; `needed` is what that alone saves in floating-point
operations, so the speed-up has to be at least as large. Dropout is off in both.
"""

import time
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig
from transformers import BertForPreTraining as HuggingFaceBert

from benchmarks.measure import parser, report
from data_prep.cli import run_cli
from data_prep.shards import Shards
from pretrain.config import PRESETS, ModelConfig, load_model_config
from pretrain.data import make_batch
from pretrain.layout import init_layout, rank_environment
from pretrain.model import BertForPreTraining, PretrainingBatch, load_weights


def padded(batch: PretrainingBatch) -> dict[str, torch.Tensor]:
    """The same batch as transformers takes it: padded to its longest sequence, labels -100 where nothing is hidden."""
    sequences = batch.sequences
    lengths = torch.diff(sequences.cu_seqlens)  # [B]
    real = torch.arange(sequences.max_seqlen) < lengths[:, None]  # [B, S]
    labels = torch.full_like(sequences.token_ids, -100)
    labels = labels.scatter(0, batch.masked_lm_positions, batch.masked_lm_labels)

    def rectangle(values: torch.Tensor, fill: int) -> torch.Tensor:
        return torch.full(real.shape, fill).masked_scatter(real, values)

    return {
        "input_ids": rectangle(sequences.token_ids, 0),
        "token_type_ids": rectangle(sequences.segment_ids, 0),
        "attention_mask": real.long(),
        "labels": rectangle(labels, -100),
        "next_sentence_label": batch.pair_labels,
    }


def our_loss(model: BertForPreTraining, batch: PretrainingBatch) -> torch.Tensor:
    mlm_loss, _, pair_loss, _ = model(batch)
    return mlm_loss.mean() + pair_loss.mean()


def seconds_of(model: torch.nn.Module, loss_of) -> tuple[float, float]:
    """(seconds of one forward and backward, loss)."""
    model.zero_grad()
    start = time.perf_counter()
    loss = loss_of()
    loss.backward()
    return time.perf_counter() - start, loss.item()


def measure(config: ModelConfig, batches: list[PretrainingBatch], rounds: int) -> dict:
    """Best time of `rounds` for each batch and model, summed over the batches, and what the batches hold."""
    theirs = HuggingFaceBert(BertConfig(**config.to_json(), attn_implementation="sdpa"))
    ours = BertForPreTraining(config, init_layout())
    load_weights(ours, dict(theirs.named_parameters()))
    seconds = np.full((rounds + 1, len(batches), 2), np.inf)  # the first round warms up
    for index, batch in enumerate(batches):
        rectangle = padded(batch)
        for turn in range(rounds + 1):
            mine, my_loss = seconds_of(ours, lambda batch=batch: our_loss(ours, batch))
            other, their_loss = seconds_of(theirs, lambda rectangle=rectangle: theirs(**rectangle).loss)
            if abs(my_loss - their_loss) > 1e-4:
                raise RuntimeError(f"batch {index}: losses {my_loss} and {their_loss} differ: not the same work")
            seconds[turn, index] = mine, other
    best = seconds[1:].min(0).sum(0)
    lengths = [torch.diff(batch.sequences.cu_seqlens).tolist() for batch in batches]
    num_tokens, num_predictions = sum(map(sum, lengths)), sum(len(batch.masked_lm_labels) for batch in batches)
    areas = [len(part) * max(part) for part in lengths]
    needed = sum(
        config.training_flops(part, len(batch.masked_lm_labels)) for part, batch in zip(lengths, batches, strict=True)
    )
    spent = sum(config.training_flops([max(part)] * len(part), area) for part, area in zip(lengths, areas, strict=True))
    return {
        "our_seconds": best[0],
        "their_seconds": best[1],
        "speed_up": best[1] / best[0],
        "needed": spent / needed,
        "share_of_padding": 1 - num_tokens / sum(areas),
        "share_of_positions_without_prediction": 1 - num_predictions / sum(areas),
        "our_samples_per_s": sum(map(len, lengths)) / best[0],
        "our_flops_per_s": needed / best[0],
    }


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--data", required=True, type=Path, help="folder of masked shards made by data_prep.build")
    options.add_argument("--model", nargs="+", choices=PRESETS, default=["base"], help="presets (default base)")
    options.add_argument("--batch-size", type=int, default=8, help="sequences of a batch (default 8)")
    options.add_argument("--batches", type=int, default=4, help="different batches (default 4)")
    args = options.parse_args(argv)
    shards = Shards(args.data)
    if shards.manifest["config"]["pair_task"] == "none":
        raise ValueError(
            f"{args.data} has no sentence pairs, which transformers' loss needs; build with --pair-task nsp"
        )
    rank_environment()
    starts = np.arange(args.batches) * args.batch_size
    batches = [make_batch(shards.gather(np.arange(start, start + args.batch_size))) for start in starts]
    rows = []
    for name in args.model:
        config = load_model_config(name, shards.manifest["vocab"]["size"])
        values = {**vars(config), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        rows.append({"model": name, **measure(ModelConfig(**values), batches, args.repeats)})
    title = f"Forward and backward, {args.batches} batches of {args.batch_size}, {torch.get_num_threads()} threads"
    report("model", {title: rows}, args.save)


if __name__ == "__main__":
    run_cli(main)
