r"""Pre-train BERT on masked shards under the DeepSpeed engine.

    deepspeed --module pretrain.train --model large --data DIR --eval-data DIR --deepspeed_config ds_configs/FILE.json \
        --output DIR --tensor-parallel 2

runs the same under torchrun, under srun with one task a rank, and alone as `python -m pretrain.train`. The same command
again goes on from the newest checkpoint in --output, as if nothing had happened.
"""

import argparse
import dataclasses
import math
import shutil
import sys
from pathlib import Path

import torch

from data_prep.cli import claim_output, run_cli, sha256_file, write_json
from data_prep.shards import Shards, unigram_entropy
from pretrain.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from pretrain.config import (
    PRESETS,
    ModelConfig,
    engine_config,
    load_deepspeed_config,
    load_model_config,
    num_accumulation_steps,
)
from pretrain.data import StepBatch, evaluation_batches, training_batches
from pretrain.engine import initialize_engine
from pretrain.layout import Layout, check_layout, init_layout, make_deterministic, rank_environment
from pretrain.model import RECOMPUTE, BertForPreTraining, init_weights, load_weights
from pretrain.schedule import learning_rate
from pretrain.telemetry import RunLog, Throughput, trust_ratio_summary
from pretrain.tensors import HEADS
from pretrain.weights import Weights, start_weights


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pretrain.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    need = parser.add_argument_group("what is trained, on what, how")
    need.add_argument("--model", required=True, help=f"{', '.join(PRESETS)}, or a Hugging Face config.json")
    need.add_argument("--data", required=True, type=Path, help="folder of masked shards made by data_prep.build")
    need.add_argument("--eval-data", type=Path, help="shards of held-out text; without it nothing is evaluated")
    need.add_argument(
        "--deepspeed_config", required=True, type=Path, help="DeepSpeed JSON of this phase, see ds_configs/README.md"
    )
    need.add_argument("--output", required=True, type=Path, help="run folder: checkpoints, metrics.jsonl, TensorBoard")
    need.add_argument(
        "--tensor-parallel", type=int, default=1, help="ranks that share one copy of the model (default 1)"
    )
    need.add_argument(
        "--sequence-parallel",
        action="store_true",
        help="split the activations between tensor-parallel products over those ranks too: less memory",
    )
    need.add_argument(
        "--recompute",
        choices=RECOMPUTE,
        default="none",
        help="what backward computes again instead of keeping it: attention (selective) or whole layers (full)",
    )
    need.add_argument(
        "--deterministic", action="store_true", help="a GPU repeats itself bit for bit, more slowly; a CPU always does"
    )
    need.add_argument(
        "--init-from",
        type=Path,
        help="weights to start from, at step 0: a Hugging Face folder, a run or checkpoint of ours, or Google's"
        " bert_model.ckpt; default: drawn from the seed",
    )
    need.add_argument(
        "--masks",
        choices=("stored", "dynamic"),
        default="stored",
        help="the shards' own masks in every epoch (stored, the default), or others in each (dynamic)",
    )
    need.add_argument("--dropout", type=float, help="of hidden states and attention; default: the model's own, 0.1")
    run = parser.add_argument_group("length and rhythm")
    run.add_argument(
        "--steps", type=int, help="steps of the phase; default: scheduler.params.total_num_steps of the config"
    )
    run.add_argument(
        "--stop-after", type=int, help="save and stop after this step; the same command without it goes on"
    )
    run.add_argument("--log-interval", type=int, default=10, help="steps between rows of metrics.jsonl (default 10)")
    run.add_argument(
        "--log-tensors", action="store_true", help="with each row, LAMB's norms and trust ratios of every tensor"
    )
    run.add_argument(
        "--eval-interval",
        type=int,
        default=1000,
        help="steps between evaluations (default 1000); the last step always has one",
    )
    run.add_argument(
        "--save-interval",
        type=int,
        default=1000,
        help="steps between checkpoints (default 1000); the last step always has one",
    )
    run.add_argument("--keep-checkpoints", type=int, default=2, help="checkpoints to keep, newest first (default 2)")
    run.add_argument("--seed", type=int, default=1234, help="of initial weights, data order and dropout (default 1234)")
    run.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override of the DeepSpeed config: optimizer.params.lr=0.004",
    )
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher passes it; the environment says it too
    return parser.parse_args(argv)


@dataclasses.dataclass
class Plan:
    """Everything a run is made of, read and checked before any rank starts to train."""

    args: argparse.Namespace
    model: ModelConfig
    deepspeed: dict
    shards: Shards
    eval_shards: Shards | None
    start: Weights | None

    @property
    def total_steps(self) -> int:
        return self.deepspeed["scheduler"]["params"]["total_num_steps"]

    @property
    def micro_batch_size(self) -> int:
        return self.deepspeed["train_micro_batch_size_per_gpu"]

    def identity(self) -> dict:
        """What makes two runs the same: not the layout, nor how a batch is cut, nor how often something is written."""
        same = ("train_batch_size", "optimizer", "scheduler", "gradient_clipping")
        values = {
            "model": dataclasses.asdict(self.model),
            "data": sha256_file(self.args.data / "manifest.json"),
            "vocab": self.shards.manifest["vocab"]["sha256"],
            "deepspeed": {key: self.deepspeed.get(key) for key in same},
            "seed": self.args.seed,
        }
        if self.args.masks != "stored":
            values["masks"] = self.args.masks
        return values if self.start is None else values | {"init_from": self.start.identity()}


def make_plan(args: argparse.Namespace, world_size: int) -> Plan:
    """Reads and checks all input; raises ValueError before anything is written or any process group starts."""
    check_layout(world_size, args.tensor_parallel, args.sequence_parallel)
    for name in ("steps", "stop_after", "log_interval", "eval_interval", "save_interval", "keep_checkpoints"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} is not a positive number")
    overrides = args.set + ([f"scheduler.params.total_num_steps={args.steps}"] if args.steps else [])
    deepspeed = load_deepspeed_config(args.deepspeed_config, overrides)
    num_accumulation_steps(deepspeed, world_size // args.tensor_parallel)
    shards = Shards(args.data)
    vocab = shards.manifest["vocab"]
    model = load_model_config(args.model, vocab["size"])
    if args.dropout is not None:
        dropout = {"hidden_dropout_prob": args.dropout, "attention_probs_dropout_prob": args.dropout}
        model = dataclasses.replace(model, **dropout)
    model = dataclasses.replace(model, pair_task=shards.manifest["config"]["pair_task"])
    model.check_tensor_parallel(args.tensor_parallel)
    seq_length = shards.manifest["config"]["seq_length"]
    if seq_length > model.max_position_embeddings:
        raise ValueError(
            f"{args.data}: sequences of {seq_length}, but max_position_embeddings={model.max_position_embeddings}"
        )
    eval_shards = Shards(args.eval_data) if args.eval_data else None
    if eval_shards:
        if eval_shards.manifest["vocab"]["sha256"] != vocab["sha256"]:
            raise ValueError(
                f"{args.eval_data} and {args.data} have different vocabularies; build both with the same file"
            )
        for key in ("seq_length", "pair_task"):
            found, expected = (part.manifest["config"][key] for part in (eval_shards, shards))
            if found != expected:
                raise ValueError(
                    f"{args.eval_data} has {key}={found}, but {args.data} has {key}={expected}; build both alike"
                )
    start = start_weights(args.init_from, model, vocab) if args.init_from else None
    return Plan(args, model, deepspeed, shards, eval_shards, start)


def claim_run_folder(plan: Plan) -> None:
    """Makes --output this run's own: identity, model, vocabulary, and both forms of the DeepSpeed config."""
    output = plan.args.output
    claim_output(output, plan.identity(), name="run", done_file="finished.json")
    write_json(output / "config.json", plan.model.to_json())
    write_json(output / "deepspeed_config.json", plan.deepspeed)
    write_json(output / "deepspeed_engine_config.json", engine_config(plan.deepspeed))
    shutil.copyfile(plan.shards.vocab_file, output / plan.shards.vocab_file.name)


def train(plan: Plan, layout: Layout) -> None:
    """The loop: batch, forward, backward, step, log, evaluate, save, stop."""
    args, output = plan.args, plan.args.output
    module = BertForPreTraining(plan.model, layout, args.recompute)
    init_weights(module, args.seed)
    drawn = load_weights(module, plan.start, optional=HEADS) if plan.start else []
    engine, optimizer = initialize_engine(module, plan.deepspeed, layout)
    saved = list_checkpoints(output)
    first = load_checkpoint(engine, layout, saved[-1]) if saved else 0
    last = min(plan.total_steps, args.stop_after or plan.total_steps)
    log = RunLog(output, layout, first, plan.total_steps)
    log.say(f"{'resumed after' if saved else 'starting at'} step {first}: {describe(plan, layout)}")
    if drawn and not saved:
        log.say(f"{plan.start.path} has no {', '.join(drawn)}: drawn from seed {args.seed}")
    throughput = Throughput(plan.model, layout)
    schedule, peak_lr = plan.deepspeed["scheduler"]["params"], plan.deepspeed["optimizer"]["params"]["lr"]
    entropy = unigram_entropy(plan.eval_shards) if plan.eval_shards and layout.rank == 0 else None
    batches = training_batches(
        *(plan.shards, args.seed, plan.deepspeed["train_batch_size"], plan.micro_batch_size, layout),
        *(range(first, last), args.masks == "dynamic"),
    )
    for step, batch in enumerate(batches, start=first + 1):
        rate = learning_rate(schedule, peak_lr, step - 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        sums = train_step(engine, batch, (args.seed, step), layout)
        throughput.add(batch)
        if step % args.log_interval == 0 or step in (1, last):
            values = training_row(sums, batch, rate, engine, optimizer, layout) | throughput.report()
            log.write("train", step, values)
            if args.log_tensors:
                log.write_tensors(step, optimizer)
            log.advance(step, loss=f"{values['loss']:.3f}", samples_per_s=f"{values['samples_per_s']:.0f}")
        if plan.eval_shards and (step % args.eval_interval == 0 or step == plan.total_steps):
            values = evaluate(engine.module, plan.eval_shards, plan.micro_batch_size, layout)
            log.write("eval", step, values | {"unigram_entropy": entropy})
            log.say(
                f"step {step}: held-out MLM loss {values['mlm_loss']:.3f}"
                + (f" (unigram entropy {entropy:.3f} nat)" if entropy else "")
            )
            throughput.reset()
        if step % args.save_interval == 0 or step == last:
            save_checkpoint(engine, layout, output, step, args.keep_checkpoints)
            throughput.reset()
    log.close()
    if last == plan.total_steps and layout.rank == 0:
        write_json(output / "finished.json", {"step": last})


def train_step(engine, batch: StepBatch, seed: tuple, layout: Layout) -> torch.Tensor:
    """One optimizer step. Returns this rank's sums, [4] float64: MLM loss, MLM correct, pair loss, pair correct.

    The loss is normalised by the step: sums divided by the counts of the whole step, over all ranks and accumulation
    steps. DeepSpeed averages gradients over the data-parallel ranks, hence the factor.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for index, micro_batch in enumerate(batch.micro_batches):
        outputs = engine(micro_batch.to(layout.device), (*seed, index, layout.dp_rank))
        mlm_loss, _, pair_loss, _ = outputs
        loss = mlm_loss.sum() / max(1, batch.num_predictions) + pair_loss.sum() / max(1, batch.num_pairs)
        engine.backward(loss * layout.dp_size, scale_wrt_gas=False)
        engine.step()
        sums += torch.stack([output.detach().double().sum() for output in outputs]).cpu()
    return sums


def training_row(sums: torch.Tensor, batch: StepBatch, rate: float, engine, optimizer, layout: Layout) -> dict:
    """What metrics.jsonl says of one step; collective. Raises FloatingPointError for a loss that is no number."""
    mlm_loss, mlm_correct, pair_loss, pair_correct = layout.sum_over_data_parallel(sums).tolist()
    row = {
        "mlm_loss": mlm_loss / max(1, batch.num_predictions),
        "mlm_accuracy": mlm_correct / max(1, batch.num_predictions),
    }
    if batch.num_pairs:
        row |= {"pair_loss": pair_loss / batch.num_pairs, "pair_accuracy": pair_correct / batch.num_pairs}
    row = {"loss": row["mlm_loss"] + row.get("pair_loss", 0.0), **row, "learning_rate": rate}
    if not math.isfinite(row["loss"]):
        raise FloatingPointError(
            f"the loss is {row['loss']}: lower optimizer.params.lr, or go on from an earlier checkpoint"
        )
    grad_norm = engine.get_global_grad_norm()
    if grad_norm is not None:
        row["grad_norm"] = float(grad_norm)
    return row | trust_ratio_summary(getattr(optimizer, "trust_ratios", {}))


@torch.no_grad()
def evaluate(module: BertForPreTraining, shards: Shards, micro_batch_size: int, layout: Layout) -> dict:
    """Averages over a whole frozen set, the same at every layout: MLM loss in nats, accuracies, perplexity.

    `mask_token_loss` counts only the positions that show [MASK]: a kept token (10 %) can be copied, so `mlm_loss` falls
    by a tenth of the entropy before a model knows anything of the context.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    for batch, counts in evaluation_batches(shards, micro_batch_size, layout):
        batch = batch.to(layout.device)
        mlm_loss, mlm_correct, _, pair_correct = module(batch)
        shows_mask = batch.sequences.token_ids[batch.masked_lm_positions] == shards.manifest["vocab"]["mask_id"]  # [P]
        parts = (mlm_loss, mlm_correct, pair_correct, mlm_loss[shows_mask], shows_mask)
        sums += counts * torch.stack([part.double().sum() for part in parts]).cpu()
    mlm_loss, mlm_correct, pair_correct, mask_loss, num_masks = layout.sum_over_data_parallel(sums).tolist()
    num_predictions = shards.manifest["num_predictions"]
    values = {
        "mlm_loss": mlm_loss / num_predictions,
        "mask_token_loss": mask_loss / max(1.0, num_masks),
        "mlm_accuracy": mlm_correct / num_predictions,
        "perplexity": math.exp(min(700.0, mlm_loss / num_predictions)),
    }
    if shards.manifest["config"]["pair_task"] != "none":
        values["pair_accuracy"] = pair_correct / shards.num_sequences
    return values


def describe(plan: Plan, layout: Layout) -> str:
    """One line on what runs where."""
    stage = plan.deepspeed.get("zero_optimization", {}).get("stage", 0)
    more = ", sequence parallel" if layout.sequence_parallel else ""
    if plan.args.recompute != "none":
        more += f", {plan.args.recompute} recomputation"
    return (
        f"{plan.args.model}, batch {plan.deepspeed['train_batch_size']}, {plan.total_steps} steps, data parallel"
        f" {layout.dp_size} x tensor parallel {layout.tp_size}{more}, ZeRO {stage},"
        f" {plan.deepspeed['optimizer']['type']}, on {layout.device.type}"
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    ranks = rank_environment()
    try:
        plan = make_plan(args, ranks["WORLD_SIZE"])
        if ranks["RANK"] == 0:
            claim_run_folder(plan)
    except (ValueError, OSError):
        if ranks["LOCAL_RANK"] == 0:
            raise
        sys.exit(2)  # the first rank of this host says why
    if (args.output / "finished.json").exists():
        return
    if args.deterministic:
        make_deterministic()
    layout = init_layout(args.tensor_parallel, args.sequence_parallel)
    train(plan, layout)
    layout.close()


if __name__ == "__main__":
    run_cli(main)
