r"""Pre-train BERT on masked shards under the DeepSpeed engine.

    deepspeed --module pretrain.train --model large --data DIR --eval-data DIR --deepspeed_config ds_configs/FILE.json \
        --output DIR --tensor-parallel 2

runs the same under torchrun, under srun with one task a rank, and alone as `python -m pretrain.train`. The same command
again goes on from the newest checkpoint in --output, as if nothing had happened.

SIGTERM, SIGUSR1 and a file STOP in --output save at the next step and end the run with exit code 0. It is complete when
finished.json is there. Exit code 1: the run cannot go on (its loss is no number); 2: a wrong input, or a full disk.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

from pretrain.loss_watch import LossWatch
from pretrain.stopping import STOP_FILE, STOP_REQUESTS, hold_stop_signals, stop_requests

if __name__ == "__main__":
    hold_stop_signals()  # before torch, whose import takes seconds in which a signal would kill the rank

import torch

from data_prep.cli import run_cli
from data_prep.files import FINISHED_FILE, mark_finished, write_json
from data_prep.shards import Shards, unigram_entropy
from pretrain.checkpoint import load_tensors, resume, save_checkpoint
from pretrain.checkpoint_reader import list_checkpoints
from pretrain.data import StepBatch, evaluation_batches, require_undamaged, training_batches
from pretrain.engine import initialize_engine, step_without_update, update_weights
from pretrain.layout import Layout, init_layout, make_deterministic, rank_environment
from pretrain.model import BertForPreTraining, init_weights, load_weights
from pretrain.options import Plan, claim_run_folder, dry_run, make_plan, parse_args
from pretrain.parameter_table import HEADS
from pretrain.schedule import learning_rate
from pretrain.telemetry import RunLog, Throughput, trust_ratio_summary
from pretrain.watchdog import Watchdog, watch_rank
from pretrain.weights import check_whole


def train(plan: Plan, layout: Layout, watchdog: Watchdog) -> None:
    """The loop: batch, forward, backward, judge, step, log, evaluate, save, stop."""
    args, total = plan.args, plan.total_steps
    data_sets = [shards for shards, _ in plan.data]
    require_undamaged([*data_sets, plan.eval_shards] if plan.eval_shards else data_sets, layout)
    engine, optimizer, first, mean_loss, warnings = start_engine(plan, layout)
    last, requests = max(first, min(total, args.stop_after or total)), []  # requests to stop before that
    log = RunLog(args.output, layout, first, total, args.wandb)
    log.say(f"{'resumed after' if first else 'starting at'} step {first}: {describe(plan, layout)}")
    log.launched(first, warnings, plan.changeable())
    throughput = Throughput(plan.model, layout)
    watch = LossWatch(plan.deepspeed.get("fp16", {}), args.spike_factor, mean_loss)
    watchdog.at(f"step {first + 1}")
    for step, batch in enumerate(batches_of(plan, layout, range(first, last)), start=first + 1):
        rate = set_learning_rate(optimizer, plan.deepspeed, step - 1)
        sums = accumulate_gradients(engine, batch, (args.seed, step), layout)
        values, requests = exchange(sums, batch, args.output, layout)
        values["learning_rate"] = rate
        if fault := update(engine, watch, log, step, values, args.skip_spikes):
            raise FloatingPointError(describe_fault(fault, step, values, sums, batch, plan, layout))
        last = step if requests else last
        throughput.add(batch)
        if step % args.log_interval == 0 or step in (1, last):
            log.train(step, values | optimizer_row(engine, optimizer) | throughput.report())
            if args.log_tensors:
                log.write_tensors(step, optimizer)
        if plan.eval_shards and (step % args.eval_interval == 0 or step == total):
            watchdog.at(f"the evaluation after step {step}")
            log.evaluation(step, evaluate(engine.module, plan.eval_shards, plan.micro_batch_size, layout))
            throughput.reset()
        if step % args.save_interval == 0 or step == last:
            watchdog.at(f"the save after step {step}")
            save_checkpoint(engine, layout, args.output, step, args.keep_checkpoints, args.keep_every, watch.mean)
            throughput.reset()
        if step == last:
            break
        watchdog.at(f"step {step + 1}")
    finish(log, last, requests, plan, layout)


def start_engine(plan: Plan, layout: Layout) -> tuple:
    """(engine, optimizer, step it stands after, running mean of the loss, warnings): from the newest checkpoint, from
    what the user named, or from the seed.
    """
    args, warnings = plan.args, []
    module = BertForPreTraining(plan.model, layout, args.recompute)
    init_weights(module, args.seed)
    is_new = not list_checkpoints(args.output)
    if plan.start and is_new:
        check_whole(plan.start, layout)
        drawn = [] if args.continue_from else load_weights(module, plan.start, optional=HEADS)
        if drawn:
            warnings.append(f"{plan.start.path} has no {', '.join(drawn)}: drawn from seed {args.seed}")
    engine, optimizer = initialize_engine(module, plan.deepspeed, layout)
    if is_new and args.continue_from:
        load_tensors(engine, layout, plan.start.path)
    first, mean_loss, told = resume(engine, layout, args.output)
    return engine, optimizer, first, mean_loss, warnings + told


def batches_of(plan: Plan, layout: Layout, steps: range) -> Iterator[StepBatch]:
    """This rank's part of every step's batch."""
    batch_size = plan.deepspeed["train_batch_size"]
    is_dynamic = plan.args.masks == "dynamic"
    return training_batches(plan.data, plan.args.seed, batch_size, plan.micro_batch_size, layout, steps, is_dynamic)


def set_learning_rate(optimizer: torch.optim.Optimizer, deepspeed: dict, num_steps_before: int) -> float:
    """The rate of the step that comes after so many, which all parameter groups are given."""
    rate = learning_rate(deepspeed["scheduler"], deepspeed["optimizer"]["params"]["lr"], num_steps_before)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def accumulate_gradients(engine, batch: StepBatch, seed: tuple, layout: Layout) -> torch.Tensor:
    """Forward and backward of one step; the update is left to the caller. Returns this rank's sums, [micro-batches, 4]
    float64 on its device: MLM loss, MLM correct, pair loss, pair correct.

    The loss is normalised by the step: sums divided by the counts of the whole step, over all ranks and accumulation
    steps. DeepSpeed averages gradients over the data-parallel ranks, hence the factor.
    """
    sums = []
    for index, micro_batch in enumerate(batch.micro_batches):
        if index:
            engine.step()  # it only counts micro-batches, until the last one
        outputs = engine(micro_batch.to(layout.device), (*seed, index, layout.dp_rank))
        mlm_loss, _, pair_loss, _ = outputs
        loss = mlm_loss.sum() / max(1, batch.num_predictions) + pair_loss.sum() / max(1, batch.num_pairs)
        engine.backward(loss * layout.dp_size, scale_wrt_gas=False)
        sums.append(torch.stack([output.detach().double().sum() for output in outputs]))
    return torch.stack(sums)


def exchange(sums: torch.Tensor, batch: StepBatch, output: Path, layout: Layout) -> tuple[dict, list[str]]:
    """The one exchange of a step over all ranks: its losses and accuracies, and the requests to stop that came to any.

    Tensor-parallel ranks have the same sums: those of the first count.
    """
    requests = stop_requests(output if layout.rank == 0 else None)
    mine = sums.sum(0) if layout.tp_rank == 0 else torch.zeros_like(sums[0])
    totals = layout.sum_over_ranks(torch.cat([mine, mine.new_tensor(requests)])).tolist()
    mlm_loss, mlm_correct, pair_loss, pair_correct = totals[:4]
    values = {
        "mlm_loss": mlm_loss / max(1, batch.num_predictions),
        "mlm_accuracy": mlm_correct / max(1, batch.num_predictions),
    }
    if batch.num_pairs:
        values |= {"pair_loss": pair_loss / batch.num_pairs, "pair_accuracy": pair_correct / batch.num_pairs}
    values = {"loss": values["mlm_loss"] + values.get("pair_loss", 0.0), **values}
    return values, [name for name, count in zip(STOP_REQUESTS, totals[4:], strict=True) if count]


def update(engine, watch: LossWatch, log: RunLog, step: int, values: dict, skip_spikes: bool) -> str | None:
    """The optimizer's step, unless the loss is a spike that is to be left out; says why if the run cannot go on."""
    mean = watch.spike(values["loss"])
    if mean:
        log.write("spike", step, {"loss": values["loss"], "mean_loss": mean, "skipped": int(skip_spikes)})
        skipped = "; its update is skipped" * skip_spikes
        log.say(f"step {step}: loss {values['loss']:.3f} is a spike, its running mean is {mean:.3f}{skipped}")
    if mean and skip_spikes:
        step_without_update(engine)
    else:
        update_weights(engine)
    loss_scale = getattr(engine.optimizer, "loss_scale", 1.0)
    return watch.fault(values["loss"], not engine.was_step_applied(), loss_scale)


def optimizer_row(engine, optimizer) -> dict:
    """Gradient norm and trust ratios of the last update, where there are any."""
    grad_norm = engine.get_global_grad_norm()
    row = {} if grad_norm is None else {"grad_norm": float(grad_norm)}
    return row | trust_ratio_summary(getattr(optimizer, "trust_ratios", {}))


def describe_fault(
    fault: str, step: int, values: dict, sums: torch.Tensor, batch: StepBatch, plan: Plan, layout: Layout
) -> str:
    """What happened in which step to which samples, as one line; collective. Rank 0 also writes it to a file.

    Suspects are the micro-batches whose sums are no numbers, or all of the step if none is.
    """
    finite = torch.isfinite(sums).all(1).tolist()
    folders = [str(shards.folder) for shards, _ in plan.data]
    parts = [
        {"dp_rank": layout.dp_rank, "micro_batch": index, "is_finite": finite[index]}
        | {"samples": [[folders[data_set], sample] for data_set, sample, _ in samples.T.tolist()]}
        for index, samples in enumerate(batch.samples)
        if layout.tp_rank == 0
    ]
    parts = [part for parts_of_rank in layout.gather(parts) for part in parts_of_rank]
    suspects = [part for part in parts if not part["is_finite"]] or parts
    samples = [sample for part in suspects for sample in part["samples"]]
    path = plan.args.output / f"fault_step_{step:08d}.json"
    if layout.rank == 0:
        write_json(path, {"step": step, "fault": fault, "seed": plan.args.seed, **values, "micro_batches": suspects})
    shown = ", ".join(f"{sample} of {folder}" for folder, sample in samples[:4]) + " ..." * (len(samples) > 4)
    return (
        f"step {step}: {fault}; {len(samples)} samples: {shown}; more in {path}. Nothing was saved since the last"
        " checkpoint: lower optimizer.params.lr, or look at the samples with `python -m data_prep.show`"
    )


@torch.no_grad()
def evaluate(module: BertForPreTraining, shards: Shards, micro_batch_size: int, layout: Layout) -> dict:
    """Averages over a whole frozen set, the same at every layout: MLM loss in nats, accuracies, perplexity.

    `mask_token_loss` counts only the positions that show [MASK]: a kept token (10 %) can be copied, so `mlm_loss` falls
    by a tenth of the entropy before a model knows anything of the context. `unigram_entropy` is the `mlm_loss` of a
    model that knows how frequent each token is, and nothing else.
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
    return values | {"unigram_entropy": unigram_entropy(shards)}


def finish(log: RunLog, last: int, requests: list[str], plan: Plan, layout: Layout) -> None:
    """After step `last`, which is saved: say why it was the last one, and that the run is complete if it is."""
    if last < plan.total_steps:
        reason = f" by {' and '.join(requests)}" if requests else ""
        log.say(f"stopped{reason} after step {last} of {plan.total_steps}, saved: the same command goes on")
    log.close()
    if layout.rank == 0:
        (plan.args.output / STOP_FILE).unlink(missing_ok=True)
        if last == plan.total_steps:
            mark_finished(plan.args.output, step=last)


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
    args = parse_args(argv, __doc__)
    ranks = rank_environment()
    try:
        plan = make_plan(args, ranks["WORLD_SIZE"])
        if args.dry_run:
            if ranks["RANK"] == 0:
                print(dry_run(plan, ranks["WORLD_SIZE"]))
            return
        if ranks["RANK"] == 0:
            lock = claim_run_folder(plan)  # held until this process ends  # noqa: F841
    except (ValueError, OSError):
        if ranks["LOCAL_RANK"] == 0:
            raise
        sys.exit(2)  # the first rank of this host says why
    if (args.output / FINISHED_FILE).exists():
        return
    if args.deterministic:
        make_deterministic()
    layout = init_layout(args.tensor_parallel, args.sequence_parallel, args.timeout)
    with watch_rank(layout, args.timeout) as watchdog:
        train(plan, layout, watchdog)
    layout.close()


if __name__ == "__main__":
    run_cli(main)
