"""Forward and backward of our model beside transformers' `BertForPreTraining` with SDPA: same weights, same batches of
real text, in turn, in one process.

    python -m benchmarks.model --data SHARDS --model base

Ours computes no padding and predicts at the masked positions alone; the line before the table says how many times as
many matrix products that saves, so the speed-up has to be at least as large. Dropout is off in all.
"""

import time
from functools import partial
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
from pretrain.telemetry import peak_flops


def padded(batch: PretrainingBatch, length: int | None = None) -> dict[str, torch.Tensor]:
    """The same batch as transformers takes it: padded to its longest sequence, or to `length`; labels are -100 where
    nothing is hidden.
    """
    sequences = batch.sequences
    lengths = torch.diff(sequences.cu_seqlens)  # [B]
    real = torch.arange(length or sequences.max_seqlen) < lengths[:, None]  # [B, S]
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


def measure(name: str, config: ModelConfig, batches: list[PretrainingBatch], args) -> list[dict]:
    """A row for each competitor, from its best time for each batch of `args.repeats` rounds, summed over the batches.
    A floor is the time that the needed matrix products take at the peak speed of a large one.
    """
    theirs = HuggingFaceBert(BertConfig(**config.to_json(), attn_implementation="sdpa"))
    ours = BertForPreTraining(config, init_layout())
    load_weights(ours, dict(theirs.named_parameters()))
    competitors = {"ours": ours, "transformers, SDPA": theirs}
    if args.compile:
        competitors["transformers, compiled"] = torch.compile(theirs, dynamic=True)
    seconds = np.full((args.repeats + 1, len(batches), len(competitors)), np.inf)  # the first round warms up
    for turn in range(args.repeats + 1):
        for index, batch in enumerate(batches):
            rectangle, losses = padded(batch), []
            for column, (who, model) in enumerate(competitors.items()):
                loss_of = partial(our_loss, ours, batch) if who == "ours" else partial(their_loss, model, rectangle)
                seconds[turn, index, column], loss = seconds_of(model, loss_of)
                losses.append(loss)
            if max(losses) - min(losses) > 1e-4:
                raise RuntimeError(f"batch {index}: losses {losses} differ: not the same work")
    best = seconds[1:].min(0).sum(0)
    lengths = [torch.diff(batch.sequences.cu_seqlens).tolist() for batch in batches]
    num_predictions = [len(batch.masked_lm_labels) for batch in batches]
    areas = [len(part) * max(part) for part in lengths]
    flops = sum(config.training_flops(part, n) for part, n in zip(lengths, num_predictions, strict=True))
    padded_flops = sum(
        config.training_flops([max(part)] * len(part), area) for part, area in zip(lengths, areas, strict=True)
    )
    num_tokens, peak = sum(map(sum, lengths)), peak_flops(torch.device("cpu"))
    print(
        f"{name}: {1 - num_tokens / sum(areas):.0%} of the positions are padding,"
        f" {sum(num_predictions) / num_tokens:.0%} of the others are predicted; transformers computes"
        f" {padded_flops / flops:.2f} times the matrix products"
    )
    times = dict(zip(competitors, best, strict=True)) | {"floor": flops / peak}
    return [
        {"model": name, "what": who, "ms": 1e3 * t, "time / ours": t / best[0], "tokens/s": num_tokens / t,
         "MFU": flops / t / peak}
        for who, t in times.items()
    ]  # fmt: skip


def their_loss(model: torch.nn.Module, rectangle: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**rectangle).loss


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--data", required=True, type=Path, help="folder of masked shards made by data_prep.build")
    options.add_argument("--model", nargs="+", choices=PRESETS, default=["base"], help="presets (default base)")
    options.add_argument("--batch-size", type=int, default=8, help="sequences of a batch (default 8)")
    options.add_argument("--compile", action="store_true", help="beside torch.compile of transformers' model, too")
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
        rows += measure(name, ModelConfig(**values), batches, args)
    length = shards.manifest["config"]["seq_length"]
    title = f"Forward and backward, {args.batches} batches of {args.batch_size} real sequences of up to {length} tokens"
    report(f"model-{length}", {f"{title}, {torch.get_num_threads()} threads": rows}, args.save)


if __name__ == "__main__":
    run_cli(main)
