"""Checkpoints in DeepSpeed's own format, written atomically and readable tensor by tensor without DeepSpeed.

    checkpoints/step_00000500/   mp_rank_*_model_states.pt, zero_pp_rank_*_optim_states.pt     DeepSpeed's
                                 checkpoint.json            step, mean loss, layout, ZeRO stage, shapes of the tp slices
                                 fragments_dp_*_tp_*.json   which part of which tensor lies where on that rank
                                 SHA256SUMS                 of all these files, in the format of `sha256sum -c`
    checkpoints/latest           the name of the newest finished one

A save writes to a `.tmp` folder, syncs it, renames it and then updates `latest`, so a kill at any moment leaves older
checkpoints intact. A resume verifies the checksums and takes the newest intact checkpoint. torch's restricted unpickler
reads the pickles, so no code from a checkpoint runs.

At the layout of the save, DeepSpeed itself resumes, bit for bit. At another layout (data or tensor parallelism, ZeRO
stage, ZeRO's partitioning and, in a new phase, precision) every weight and moment is assembled, sliced for the new
layout and copied into the new partitions, which `lamb.fragments_by_partition` locates. DeepSpeed's universal
checkpoints are not used because they cannot cross ZeRO stages.
"""

import dataclasses
import os
import pkgutil
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data_prep.cli import describe_error
from data_prep.files import finished_file, read_json, sha256_file, sync_folder, write_json
from pretrain.checkpoint_reader import (
    CHECKSUMS,
    DEEPSPEED_CLASSES,
    MOMENTS,
    damaged_files,
    fragments_file,
    list_checkpoints,
    load_file,
    tensor_reader,
)
from pretrain.lamb import Fragment, fragments_by_partition
from pretrain.layers import is_split, local_shape
from pretrain.layout import Layout
from pretrain.model import slice_tensor, whole_shape


def save_checkpoint(
    engine,
    layout: Layout,
    run_folder: Path,
    step: int,
    keep: int,
    keep_every: int | None = None,
    mean_loss: float | None = None,
) -> Path:
    """Save weights, moments, step and mean loss; return the finished folder. Collective.

    Keeps the newest `keep` checkpoints and those of every `keep_every`-th step, and removes the others. Raises OSError
    if the checkpoint cannot be written.
    """
    parent = run_folder / "checkpoints"
    name = f"step_{step:08d}"
    unfinished, finished = parent / f"{name}.tmp", parent / name
    try:
        if layout.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        layout.barrier()
        engine.save_checkpoint(str(parent), tag=unfinished.name, client_state={"step": step}, save_latest=False)
        write_json(fragments_file(unfinished, layout.dp_rank, layout.tp_rank), _fragments(engine))
        checksums = layout.gather({path.name: _synced_sha256(path) for path in _files_of_rank(unfinished, layout)})
        if layout.rank == 0:
            write_json(unfinished / "checkpoint.json", _description(engine, layout, step, mean_loss))
            _write_checksums(unfinished, {name: digest for part in checksums for name, digest in part.items()})
            _remove(finished)
            unfinished.rename(finished)
            sync_folder(parent)
            with finished_file(parent / "latest", "w") as file:
                file.write(name)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise  # torch reports a full disk with that text
        free = shutil.disk_usage(run_folder).free
        raise OSError(
            f"{finished} could not be written ({describe_error(error).splitlines()[0]}); {free:,} bytes are free there,"
            " earlier checkpoints are intact. Make room and run the same command again: it resumes from the newest one"
        ) from error
    if layout.rank == 0:
        for old in list_checkpoints(run_folder)[:-keep]:
            if not keep_every or int(old.name.removeprefix("step_")) % keep_every:
                _remove(old)
    layout.barrier()
    return finished


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint if it exists. It is renamed first, so that a kill cannot leave half of it under its name."""
    if checkpoint.exists():
        shutil.rmtree(checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.tmp")))


def remove_partial_checkpoints(run_folder: Path) -> None:
    """Remove what killed saves left behind. The caller ensures that no other process writes there."""
    for unfinished in (run_folder / "checkpoints").glob("step_*.tmp"):
        shutil.rmtree(unfinished)


def _files_of_rank(folder: Path, layout: Layout) -> list[Path]:
    """The files that this rank has written, found by their names."""
    dp_rank, tp_rank = layout.dp_rank, layout.tp_rank
    patterns = [f"*pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_*", fragments_file(folder, dp_rank, tp_rank).name]
    if dp_rank == 0:
        patterns.append(f"mp_rank_{tp_rank:02d}_*")
    return [path for pattern in patterns for path in folder.glob(pattern)]


def _synced_sha256(path: Path) -> str:
    """Sync a file to disk, so that a crash after the rename cannot lose it, and return its checksum."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return sha256_file(path)


def _write_checksums(folder: Path, checksums: dict[str, str]) -> None:
    """Write CHECKSUMS of all files in a folder. checkpoint.json comes last, so a list without it was cut short."""
    others = [path for path in folder.iterdir() if path.name not in checksums]
    checksums |= {path.name: _synced_sha256(path) for path in others}
    names = sorted(checksums, key=lambda name: (name == "checkpoint.json", name))
    with finished_file(folder / CHECKSUMS, "w") as file:
        file.writelines(f"{checksums[name]}  {name}\n" for name in names)


class Resumed(NamedTuple):
    """The point from which a run continues."""

    step: int  # the last completed one; 0 if there is no checkpoint
    mean_loss: float | None  # running mean of the loss
    warnings: list[str]


def resume(engine, layout: Layout, run_folder: Path) -> Resumed:
    """Restore a run's newest intact checkpoint and rename damaged newer ones to `*.damaged`. Collective.

    Raises ValueError if there are checkpoints but none is intact.
    """
    damaged = {}
    for folder in reversed(list_checkpoints(run_folder)):
        if problems := damaged_files(folder, layout):
            damaged[folder] = ", ".join(problems)
            continue
        saved = load_checkpoint(engine, layout, folder)
        warnings = []
        for bad, what in damaged.items():
            aside = bad.with_name(f"{bad.name}.damaged")
            warnings.append(f"{bad} is damaged ({what}), renamed to {aside.name}")
            if layout.rank == 0:
                _remove(aside)
                bad.rename(aside)
        return Resumed(saved["step"], saved.get("mean_loss"), warnings)
    if damaged:
        what = "; ".join(f"{bad.name}: {problems}" for bad, problems in damaged.items())
        raise ValueError(
            f"{run_folder}: every checkpoint is damaged ({what}); restore one, or start again with another --output"
        )
    return Resumed(0, None, [])


def _layout_of(engine, layout: Layout) -> dict:
    """What must match, besides the fragments, for DeepSpeed to load its own files."""
    return {
        "dp_size": layout.dp_size,
        "tp_size": layout.tp_size,
        "zero_stage": int(engine.zero_optimization_stage()),
        "precision": str(engine.get_data_types()[0]).removeprefix("torch."),
    }


def _description(engine, layout: Layout, step: int, mean_loss: float | None) -> dict:
    tensors = {}
    for name, parameter in engine.module.named_parameters():
        split = is_split(parameter)
        tensors[name] = {"shape": local_shape(parameter), "partition_dim": parameter.partition_dim if split else None}
    return {"step": step, "mean_loss": mean_loss, **_layout_of(engine, layout), "tensors": tensors}


def _fragments(engine) -> list[list[dict]]:
    """The fragments in each partition of this rank, in the order of the optimizer's state."""
    fragments = fragments_by_partition(engine)
    flats = [flat for group in engine.basic_optimizer.param_groups for flat in group["params"]] or fragments
    return [[dataclasses.asdict(part) for part in fragments[flat] if part.numel] for flat in flats]


def load_checkpoint(engine, layout: Layout, folder: Path) -> dict:
    """Restore weights, moments and counters from a checkpoint of any layout; return its checkpoint.json. Collective."""
    description = read_json(folder / "checkpoint.json")
    here = _layout_of(engine, layout)
    is_same = all(description.get(key) == value for key, value in here.items())
    if is_same and read_json(fragments_file(folder, layout.dp_rank, layout.tp_rank)) == _fragments(engine):
        classes = [pkgutil.resolve_name(name) for name in DEEPSPEED_CLASSES]
        engine.checkpoint_engine.load = partial(load_file, classes=classes)  # DeepSpeed's own would unpickle anything
        engine.load_checkpoint(str(folder.parent), tag=folder.name)
    else:
        load_tensors(engine, layout, folder)
    return description


@torch.no_grad()
def load_tensors(engine, layout: Layout, folder: Path) -> None:
    """Copy weights and moments from a checkpoint of any layout into this rank's partitions, one tensor at a time.

    The optimizer keeps its own settings but takes over the number of updates, on which bias correction depends.
    """
    _, read = tensor_reader(folder)
    optimizer, stage = engine.basic_optimizer, engine.zero_optimization_stage()
    first = next(folder.glob("*mp_rank_00_model_states.pt"))
    counters = {name: load_file(first, mmap=True)[name] for name in ("global_steps", "global_samples", "skipped_steps")}
    num_updates = float(counters["global_steps"] - counters["skipped_steps"])
    places: dict[str, list[tuple[Tensor, Fragment]]] = {}
    for flat, parts in fragments_by_partition(engine).items():
        moments = {kind: torch.zeros_like(flat) for kind in MOMENTS}
        optimizer.state[flat] = {"step": torch.tensor(num_updates), **moments}
        for part in parts:
            places.setdefault(part.name, []).append((flat, part))
    for name, parameter in engine.module.named_parameters():
        num_rows = whole_shape(parameter, name, engine.module.bert.config, layout)[0]
        for kind in ("weight", *MOMENTS):
            tensor = slice_tensor(read(name, kind)[:num_rows], parameter, layout)
            for flat, part in places[name]:
                target = flat if kind == "weight" else optimizer.state[flat][kind]
                source = tensor.reshape(-1)[part.tensor_start :][: part.numel]
                part.of(target).copy_(source)
            if kind == "weight" and stage < 3:
                parameter.copy_(tensor)
    if stage == 3:
        _refresh_partitioned_weights(engine.optimizer)
    for name, value in counters.items():
        setattr(engine, name, value)
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()


def _refresh_partitioned_weights(optimizer) -> None:
    """Copy ZeRO 3's fp32 partitions into those that it computes with, as its own loader does."""
    groups = zip(
        optimizer.fp32_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups,
        strict=True,
    )
    for master, flat, parts in groups:
        flat.data.copy_(master.data)
        for part, updated in zip(parts, optimizer.unflatten(flat, parts), strict=True):
            part.data = updated.data
