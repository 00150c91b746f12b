"""Pre-train BERT on masked shards: the loop, one step, the evaluation. `--help` says how to run and to stop it."""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from pretrain.loss_watch import LossWatch
from pretrain.stopping import STOP_FILE, STOP_REQUESTS, hold_stop_signals, stop_requests

if __name__ == "__main__":
    hold_stop_signals()  # before torch, whose import takes seconds in which a signal would kill the rank

import torch

from data_prep.cli import parse, run_cli
from data_prep.files import FINISHED_FILE, mark_finished, write_json
from data_prep.shards import Shards, unigram_entropy
from pretrain.checkpoint import load_tensors, resume, save_checkpoint
from pretrain.checkpoint_reader import list_checkpoints
from pretrain.data import StepBatch, evaluation_batches, require_undamaged, training_batches
from pretrain.engine import initialize_engine, step_without_update, update_weights
from pretrain.layout import Layout, init_layout, make_deterministic, rank_environment
from pretrain.model import BertForPreTraining, init_weights, load_weights
from pretrain.options import TrainingRun, TrainOptions, claimed_run_folder, dry_run, prepare_run
from pretrain.parameter_table import HEADS
from pretrain.schedule import learning_rate
from pretrain.telemetry import RunLog, Throughput, trust_ratio_summary
from pretrain.watchdog import Watchdog, one_report_per_host, watch_rank
from pretrain.weights import check_whole


def train(run: TrainingRun, layout: Layout, watchdog: Watchdog) -> None:
    """The loop: batch, forward, backward, update, log, evaluate, save, stop. Collective.

    Raises FloatingPointError on all ranks if the run cannot continue, and RuntimeError if another rank has died
    (`watch_rank` ends the rank then); `watchdog` ends a rank that hangs.
    """
    options, total = run.options, run.total_steps
    require_undamaged([shards for shards, _ in run.data] + ([run.eval_shards] if run.eval_shards else []), layout)
    engine, optimizer, first, mean_loss, warnings = start_engine(run, layout)
    last, requests = max(first, min(total, options.stop_after or total)), []
    log = RunLog(options.output, layout, first, total, options.wandb)
    log.say(f"{'resumed after' if first else 'starting at'} step {first}: {describe(run, layout)}")
    log.launched(first, warnings, run.changeable())
    throughput = Throughput(run.model, layout)
    watch = LossWatch(run.deepspeed.get("fp16", {}), options.spike_factor, mean_loss)
    watchdog.at(f"step {first + 1}")
    for step, batch in enumerate(batches_of(run, layout, range(first, last)), start=first + 1):
        rate = set_learning_rate(optimizer, run.deepspeed, step - 1)
        sums = accumulate_gradients(engine, batch, (options.seed, step), layout)
        values, requests = exchange(sums, batch, options.output, layout)
        values["learning_rate"] = rate
        if fault := update(engine, watch, log, step, values, options.skip_spikes):
            raise FloatingPointError(describe_fault(fault, step, values, sums, batch, run, layout))
        last = step if requests else last
        throughput.add(batch)
        if step % options.log_interval == 0 or step in (1, last):
            log.train(step, values | optimizer_row(engine, optimizer) | throughput.report())
            if options.log_tensors:
                log.write_tensors(step, optimizer)
        if run.eval_shards and (step % options.eval_interval == 0 or step == total):
            watchdog.at(f"the evaluation after step {step}")
            log.evaluation(step, evaluate(engine.module, run.eval_shards, run.micro_batch_size, layout))
            throughput.reset()
        if step % options.save_interval == 0 or step == last:
            watchdog.at(f"the save after step {step}")
            save_checkpoint(
                engine, layout, options.output, step, options.keep_checkpoints, options.keep_every, watch.mean
            )
            throughput.reset()
        if step == last:
            break
        watchdog.at(f"step {step + 1}")
    finish(log, last, requests, run, layout)


class Start(NamedTuple):
    """The engine and what a run continues from."""

    engine: object  # DeepSpeed's
    optimizer: torch.optim.Optimizer
    step: int  # the last completed one; 0 for a new run
    mean_loss: float | None  # running mean of the loss; None for a new run
    warnings: list[str]


def start_engine(run: TrainingRun, layout: Layout) -> Start:
    """Build model and engine, filled from the run's newest checkpoint, else from --continue-from or --init-from, else
    from the seed. Collective.
    """
    options, warnings = run.options, []
    module = BertForPreTraining(run.model, layout, options.recompute)
    init_weights(module, options.seed)
    is_new = not list_checkpoints(options.output)
    if run.start and is_new:
        check_whole(run.start, layout)
        if options.init_from and (drawn := load_weights(module, run.start, optional=HEADS)):
            warnings.append(f"{run.start.path} has no {', '.join(drawn)}: drawn from seed {options.seed}")
    engine, optimizer = initialize_engine(module, run.deepspeed, layout)
    if is_new and options.continue_from:
        load_tensors(engine, layout, run.start.path)
    saved = resume(engine, layout, options.output)
    return Start(engine, optimizer, saved.step, saved.mean_loss, warnings + saved.warnings)


def batches_of(run: TrainingRun, layout: Layout, steps: range) -> Iterator[StepBatch]:
    """This rank's part of every step's batch."""
    batch_size, is_dynamic = run.deepspeed["train_batch_size"], run.options.masks == "dynamic"
    return training_batches(run.data, run.options.seed, batch_size, run.micro_batch_size, layout, steps, is_dynamic)


def set_learning_rate(optimizer: torch.optim.Optimizer, deepspeed: dict, num_steps_before: int) -> float:
    """Set the learning rate of all parameter groups for the step after `num_steps_before` steps. Returns the rate."""
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
            engine.step()  # before the last micro-batch it only counts
        outputs = engine(micro_batch.to(layout.device), (*seed, index, layout.dp_rank))
        mlm_loss, _, pair_loss, _ = outputs
        loss = mlm_loss.sum() / max(1, batch.num_predictions) + pair_loss.sum() / max(1, batch.num_pairs)
        engine.backward(loss * layout.dp_size, scale_wrt_gas=False)
        sums.append(torch.stack([output.detach().double().sum() for output in outputs]))
    return torch.stack(sums)


def exchange(sums: torch.Tensor, batch: StepBatch, output: Path, layout: Layout) -> tuple[dict, list[str]]:
    """The one exchange between all ranks in a step. Returns the step's losses and accuracies, and the requests to stop
    that have reached any rank.

    Tensor-parallel ranks have the same sums, so only the first one's are counted.
    """
    requests = stop_requests(output if layout.rank == 0 else None)
    counted = sums.sum(0) if layout.tp_rank == 0 else torch.zeros_like(sums[0])
    totals = layout.sum_over_ranks(torch.cat([counted, counted.new_tensor(requests)])).tolist()
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
    """Update the weights, unless the loss is a spike that is to be skipped. Returns why the run cannot continue, if it
    cannot.
    """
    mean = watch.spike(values["loss"])
    is_skipped = bool(mean) and skip_spikes
    if mean:
        log.write("spike", step, {"loss": values["loss"], "mean_loss": mean, "skipped": int(skip_spikes)})
        note = "; its update is skipped" if is_skipped else ""
        log.say(f"step {step}: loss {values['loss']:.3f} is a spike, its running mean is {mean:.3f}{note}")
    if is_skipped:
        step_without_update(engine)
    else:
        update_weights(engine)
    return watch.fault(values["loss"], not engine.was_step_applied(), getattr(engine.optimizer, "loss_scale", 1.0))


def optimizer_row(engine, optimizer) -> dict:
    """Gradient norm and trust ratios of the last update, as far as there are any."""
    grad_norm = engine.get_global_grad_norm()
    row = {} if grad_norm is None else {"grad_norm": float(grad_norm)}
    return row | trust_ratio_summary(getattr(optimizer, "trust_ratios", {}))


def describe_fault(
    fault: str, step: int, values: dict, sums: torch.Tensor, batch: StepBatch, run: TrainingRun, layout: Layout
) -> str:
    """One line on what happened in which step to which samples; rank 0 writes all of it to a file. Collective.

    The suspects are the micro-batches whose sums are not finite, or all of the step if every sum is.
    """
    folders, parts = [str(shards.folder) for shards, _ in run.data], []
    for index, (samples, is_finite) in enumerate(zip(batch.samples, torch.isfinite(sums).all(1).tolist(), strict=True)):
        named = [[folders[data_set], sample] for data_set, sample, _ in samples.T.tolist()]
        parts.append({"dp_rank": layout.dp_rank, "micro_batch": index, "is_finite": is_finite, "samples": named})
    parts = [part for of_rank in layout.gather(parts if layout.tp_rank == 0 else []) for part in of_rank]
    suspects = [part for part in parts if not part["is_finite"]] or parts
    samples = [sample for part in suspects for sample in part["samples"]]
    path = run.options.output / f"fault_step_{step:08d}.json"
    if layout.rank == 0:
        write_json(path, {"step": step, "fault": fault, "seed": run.options.seed, **values, "micro_batches": suspects})
    shown = ", ".join(f"{sample} of {folder}" for folder, sample in samples[:4])
    return (
        f"step {step}: {fault}; {len(samples)} samples: {shown}{' ...' if len(samples) > 4 else ''}; more in {path}."
        " The last checkpoint is unaffected: lower optimizer.params.lr, or look at the samples with"
        " `python -m data_prep.show`"
    )


@torch.no_grad()
def evaluate(module: BertForPreTraining, shards: Shards, micro_batch_size: int, layout: Layout) -> dict:
    """Averages over a whole held-out set, the same at every layout: MLM loss in nats, accuracies, perplexity.

    `mask_token_loss` counts only the positions that show [MASK]. A kept token (10 %) can be copied, so `mlm_loss` falls
    by a tenth of the entropy before a model has learned anything from context. `unigram_entropy` is the `mlm_loss` of a
    model that knows only how frequent each token is.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    for batch, counts in evaluation_batches(shards, micro_batch_size, layout):
        batch = batch.to(layout.device)
        mlm_loss, mlm_correct, _, pair_correct = module(batch)
        shows_mask = batch.sequences.token_ids[batch.masked_lm_rows] == shards.manifest["vocab"]["mask_id"]  # [P]
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


def finish(log: RunLog, last: int, requests: list[str], run: TrainingRun, layout: Layout) -> None:
    """Report why step `last`, which is saved, was the last one, and mark the run finished if it is complete."""
    if last < run.total_steps:
        reason = f" by {' and '.join(requests)}" if requests else ""
        log.say(f"stopped{reason} after step {last} of {run.total_steps}, saved: the same command resumes")
    log.close()
    if layout.rank == 0:
        (run.options.output / STOP_FILE).unlink(missing_ok=True)
        if last == run.total_steps:
            mark_finished(run.options.output, step=last)


def describe(run: TrainingRun, layout: Layout) -> str:
    """One line on what runs where."""
    stage = run.deepspeed.get("zero_optimization", {}).get("stage", 0)
    more = ", sequence parallel" if layout.sequence_parallel else ""
    if run.options.recompute != "none":
        more += f", {run.options.recompute} recomputation"
    return (
        f"{run.options.model}, batch {run.deepspeed['train_batch_size']}, {run.total_steps} steps, data parallel"
        f" {layout.dp_size} x tensor parallel {layout.tp_size}{more}, ZeRO {stage},"
        f" {run.deepspeed['optimizer']['type']}, on {layout.device.type}"
    )


def main(argv: list[str] | None = None) -> None:
    options, ranks = parse(TrainOptions, "pretrain.train", argv), rank_environment()
    with ExitStack() as held:
        with one_report_per_host(ranks["LOCAL_RANK"]):
            run = prepare_run(options, ranks["WORLD_SIZE"])
            if options.dry_run:
                if ranks["RANK"] == 0:
                    print(dry_run(run, ranks["WORLD_SIZE"]))
                return
            if ranks["RANK"] == 0:
                held.enter_context(claimed_run_folder(run))
        if (options.output / FINISHED_FILE).exists():
            return
        if options.deterministic:
            make_deterministic()
        layout = init_layout(options.tensor_parallel, options.sequence_parallel, options.timeout)
        with watch_rank(layout, options.timeout) as watchdog:
            train(run, layout, watchdog)
        layout.close()


if __name__ == "__main__":
    run_cli(main)
