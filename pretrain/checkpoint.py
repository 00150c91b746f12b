"""Checkpoints: DeepSpeed's own files in a folder that appears whole or not at all, and readable tensor by tensor
without DeepSpeed.

    checkpoints/step_00000500/   mp_rank_*_model_states.pt, zero_pp_rank_*_optim_states.pt     DeepSpeed's
                                 checkpoint.json        step, layout, ZeRO stage, whole shapes
                                 fragments_dp_*_tp_*.json   which part of which tensor stands where on that rank
    checkpoints/latest           the name of the newest finished one

A save goes to a `.tmp` folder, is synced, and is renamed; `latest` follows. So a job killed at any moment leaves the
old ones intact.

A resume at the layout of the save is DeepSpeed's own, bit for bit. At another one (data parallel, tensor parallel,
ZeRO stage, precision, how ZeRO cuts its groups) every tensor is put together, sliced anew and copied into the new
partitions, weight and moments, through the map that LAMB is bound by; DeepSpeed's universal checkpoint cannot cross
ZeRO stages.
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from data_prep.cli import finished_file, read_json, sync_folder, write_json
from pretrain.lamb import Fragment, fragments_by_partition
from pretrain.layers import is_split, local_shape
from pretrain.layout import Layout
from pretrain.model import slice_tensor, whole_shape

STEP_FOLDER = re.compile(r"step_\d{8}")
MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(engine, layout: Layout, run_folder: Path, step: int, keep: int) -> Path:
    """Saves weights, moments and the step; collective. Keeps the newest `keep` checkpoints. Returns the finished
    folder.
    """
    parent = run_folder / "checkpoints"
    name = f"step_{step:08d}"
    partial, finished = parent / f"{name}.tmp", parent / name
    if layout.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    layout.barrier()
    engine.save_checkpoint(str(parent), tag=partial.name, client_state={"step": step}, save_latest=False)
    write_json(_fragments_file(partial, layout.dp_rank, layout.tp_rank), _fragments(engine))
    layout.barrier()
    if layout.rank == 0:
        write_json(partial / "checkpoint.json", _description(engine, layout, step))
        _sync_tree(partial)
        shutil.rmtree(finished, ignore_errors=True)
        partial.rename(finished)
        sync_folder(parent)
        with finished_file(parent / "latest", "w") as file:
            file.write(name)
        for old in list_checkpoints(run_folder)[:-keep]:
            shutil.rmtree(old)
    layout.barrier()
    return finished


def _sync_tree(folder: Path) -> None:
    """Flushes every file of a folder to disk, so that a rename never names lost bytes."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def _layout_of(engine, layout: Layout) -> dict:
    """What has to be the same for DeepSpeed to load its own files, together with the fragments."""
    return {
        "dp_size": layout.dp_size,
        "tp_size": layout.tp_size,
        "zero_stage": int(engine.zero_optimization_stage()),
        "precision": str(engine.get_data_types()[0]).removeprefix("torch."),
    }


def _description(engine, layout: Layout, step: int) -> dict:
    tensors = {}
    for name, parameter in engine.module.named_parameters():
        split = is_split(parameter)
        tensors[name] = {"shape": local_shape(parameter), "partition_dim": parameter.partition_dim if split else None}
    return {"step": step, **_layout_of(engine, layout), "tensors": tensors}


def _fragments(engine) -> list[list[dict]]:
    """Of each partition of this rank, in the order of the optimizer's state: the parts of tensors in it."""
    fragments = fragments_by_partition(engine)
    flats = [flat for group in engine.basic_optimizer.param_groups for flat in group["params"]] or fragments
    return [[dataclasses.asdict(part) for part in fragments[flat] if part.numel] for flat in flats]


def _fragments_file(folder: Path, dp_rank: int, tp_rank: int) -> Path:
    return folder / f"fragments_dp_{dp_rank}_tp_{tp_rank}.json"


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    folder = Path(run_folder) / "checkpoints"
    return sorted(path for path in folder.glob("step_*") if STEP_FOLDER.fullmatch(path.name))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that a user means by a run folder or a checkpoint folder; ValueError if there is none."""
    path = Path(path)
    if (path / "checkpoint.json").is_file():
        return path
    finished = list_checkpoints(path)
    if not finished:
        raise ValueError(
            f"{path}: no checkpoint here; give a run folder with checkpoints/step_* in it, or one of these"
        )
    return finished[-1]


def run_folder_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint folder belongs to: it holds the model's config.json and the vocabulary."""
    return checkpoint.resolve().parent.parent


def load_checkpoint(engine, layout: Layout, folder: Path) -> int:
    """Restores weights, moments and DeepSpeed's counters from a checkpoint of any layout; collective. Returns the step
    it was saved after.
    """
    description = read_json(folder / "checkpoint.json")
    here = _layout_of(engine, layout)
    is_same = all(description.get(key) == value for key, value in here.items())
    if is_same and read_json(_fragments_file(folder, layout.dp_rank, layout.tp_rank)) == _fragments(engine):
        engine.load_checkpoint(str(folder.parent), tag=folder.name)
    else:
        _load_whole_tensors(engine, layout, folder)
    return description["step"]


@torch.no_grad()
def _load_whole_tensors(engine, layout: Layout, folder: Path) -> None:
    """Fills this rank's partitions from the whole tensors of a checkpoint, one at a time in memory."""
    names, read = tensor_reader(folder)
    optimizer, stage = engine.basic_optimizer, engine.zero_optimization_stage()
    first = next(folder.glob("*mp_rank_00_model_states.pt"))
    counters = {name: _load(first)[name] for name in ("global_steps", "global_samples", "skipped_steps")}
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
                source = tensor.reshape(-1)[part.tensor_start : part.tensor_start + part.numel]
                target.view(-1)[part.start : part.start + part.numel].copy_(source)
            if kind == "weight" and stage < 3:
                parameter.copy_(tensor)
    if stage == 3:
        _refresh_partitioned_weights(engine.optimizer)
    for name, value in counters.items():
        setattr(engine, name, value)
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()


def _refresh_partitioned_weights(optimizer) -> None:
    """ZeRO 3 computes with copies of its fp32 partitions: brings them up to date, as its own loader does."""
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


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, whole float32 weight) of every tensor of a checkpoint, at any layout and ZeRO stage; one at a time in
    memory.

    Slices are merged over tensor-parallel ranks; rows that pad the vocabulary are still there.
    """
    names, read = tensor_reader(folder)
    for name in names:
        yield name, read(name)


def tensor_reader(folder: Path) -> tuple[list[str], Callable[..., Tensor]]:
    """The names of a checkpoint's tensors, and a function (name, kind="weight") -> whole float32 tensor; the other
    kinds are its MOMENTS.
    """
    description = read_json(folder / "checkpoint.json")
    readers = [_rank_reader(folder, description, tp_rank) for tp_rank in range(description["tp_size"])]

    @torch.no_grad()
    def read(name: str, kind: str = "weight") -> Tensor:
        slices = [reader(name, kind) for reader in readers]
        dim = description["tensors"][name]["partition_dim"]
        return slices[0] if dim is None else torch.cat(slices, dim)

    return list(description["tensors"]), read


def _rank_reader(folder: Path, description: dict, tp_rank: int) -> Callable[[str, str], Tensor]:
    """A function (name, kind) -> this tensor-parallel rank's float32 slice, over memory-mapped files."""
    places: dict[str, list[tuple[dict, Fragment]]] = {}
    for dp_rank in range(description["dp_size"] if description["zero_stage"] else 1):
        fragments = read_json(_fragments_file(folder, dp_rank, tp_rank))
        partitions = _partitions(folder, description["zero_stage"], dp_rank, tp_rank, fragments)
        for partition, parts in zip(partitions, fragments, strict=True):
            for part in parts:
                places.setdefault(part["name"], []).append((partition, Fragment(**part)))

    def read(name: str, kind: str) -> Tensor:
        whole = torch.zeros(description["tensors"][name]["shape"])
        for partition, part in places[name]:
            if kind not in partition:
                continue  # saved before the first step: no moments yet
            target = whole.view(-1)[part.tensor_start : part.tensor_start + part.numel]
            target.copy_(partition[kind].detach().view(-1)[part.start : part.start + part.numel])
        return whole

    return read


def _partitions(folder: Path, zero_stage: int, dp_rank: int, tp_rank: int, fragments: list) -> list[dict]:
    """For each partition that one rank's optimizer held: its "weight" and, after a first step, its MOMENTS."""
    if zero_stage:
        (path,) = folder.glob(f"*zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_optim_states.pt")
        saved = _load(path)["optimizer_state_dict"]
        weights = saved["fp32_flat_groups" if zero_stage == 3 else "single_partition_of_fp32_groups"]
        moments = saved["optimizer_state_dict" if zero_stage == 3 else "base_optimizer_state"]["state"]
    else:
        states = _load(folder / f"mp_rank_{tp_rank:02d}_model_states.pt")
        saved = states["optimizer"]
        if "fp32_groups" in saved:  # 16 bit: the optimizer has whole fp32 copies
            weights = [weight for group in saved["fp32_groups"] for weight in group]
            moments = saved["optimizer_state_dict"]["state"]
        else:
            weights = [states["module"][part["name"]] for (part,) in fragments]
            moments = saved["state"]
    return [{"weight": weight, **moments.get(index, {})} for index, weight in enumerate(weights)]


def _load(path: Path) -> dict:
    """A file of DeepSpeed's, memory-mapped: tensors are read from disk when they are used."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
