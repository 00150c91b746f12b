"""Checkpoints: DeepSpeed's own files in a folder that appears whole or not at all, and readable tensor by tensor
without DeepSpeed.

    checkpoints/step_00000500/   mp_rank_*_model_states.pt, zero_pp_rank_*_optim_states.pt     DeepSpeed's
                                 checkpoint.json        step, layout, ZeRO stage, whole shapes
                                 fragments_dp_*_tp_*.json   which part of which tensor stands where on that rank
    checkpoints/latest           the name of the newest finished one

A save goes to a `.tmp` folder, is synced, and is renamed; `latest` follows. So a job killed at any moment leaves the
old ones intact.
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
from pretrain.layout import Layout

STEP_FOLDER = re.compile(r"step_\d{8}")


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
    _write_fragments(engine, layout, partial)
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


def _description(engine, layout: Layout, step: int) -> dict:
    tensors = {}
    for name, parameter in engine.module.named_parameters():
        split = getattr(parameter, "tensor_model_parallel", False)
        shape = list(getattr(parameter, "ds_shape", parameter.shape))
        tensors[name] = {"shape": shape, "partition_dim": parameter.partition_dim if split else None}
    stage = engine.zero_optimization_stage()
    return {
        "step": step,
        "dp_size": layout.dp_size,
        "tp_size": layout.tp_size,
        "zero_stage": int(stage),
        "tensors": tensors,
    }


def _write_fragments(engine, layout: Layout, folder: Path) -> None:
    if engine.zero_optimization_stage() == 0:
        return  # whole tensors stand in the model states
    partitions = [
        [dataclasses.asdict(part) for part in parts if part.numel] for parts in fragments_by_partition(engine).values()
    ]
    write_json(folder / f"fragments_dp_{layout.dp_rank}_tp_{layout.tp_rank}.json", partitions)


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
    """Restores weights and moments from a checkpoint of the same layout; collective. Returns the step it was saved
    after.
    """
    description = read_json(folder / "checkpoint.json")
    here = {"dp_size": layout.dp_size, "tp_size": layout.tp_size, "zero_stage": int(engine.zero_optimization_stage())}
    there = {key: description[key] for key in here}
    if here != there:
        raise ValueError(f"{folder} was saved at {there}, this run is at {here}; resume at the layout it was saved at")
    engine.load_checkpoint(str(folder.parent), tag=folder.name)
    return description["step"]


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, whole float32 weight) of every tensor of a checkpoint, at any layout and ZeRO stage; one at a time in
    memory.

    Slices are merged over tensor-parallel ranks; rows that pad the vocabulary are still there.
    """
    names, read = tensor_reader(folder)
    for name in names:
        yield name, read(name)


def tensor_reader(folder: Path) -> tuple[list[str], Callable[[str], Tensor]]:
    """The names of a checkpoint's tensors, and a function name -> whole float32 weight."""
    description = read_json(folder / "checkpoint.json")
    readers = [_rank_reader(folder, description, tp_rank) for tp_rank in range(description["tp_size"])]

    @torch.no_grad()
    def read(name: str) -> Tensor:
        slices = [reader(name) for reader in readers]
        dim = description["tensors"][name]["partition_dim"]
        return slices[0].detach().clone() if dim is None else torch.cat(slices, dim)

    return list(description["tensors"]), read


def _rank_reader(folder: Path, description: dict, tp_rank: int):
    """A function name -> this tensor-parallel rank's float32 slice, over memory-mapped files."""
    if description["zero_stage"] == 0:
        module = _load(folder / f"mp_rank_{tp_rank:02d}_model_states.pt")["module"]
        return lambda name: module[name].float()
    places: dict[str, list[tuple[Tensor, Fragment]]] = {}
    for dp_rank in range(description["dp_size"]):
        (path,) = folder.glob(f"*zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_optim_states.pt")
        state = _load(path)["optimizer_state_dict"]
        flats = state["fp32_flat_groups" if description["zero_stage"] == 3 else "single_partition_of_fp32_groups"]
        for flat, parts in zip(flats, read_json(folder / f"fragments_dp_{dp_rank}_tp_{tp_rank}.json"), strict=True):
            for part in parts:
                places.setdefault(part["name"], []).append((flat, Fragment(**part)))

    def read(name: str) -> Tensor:
        whole = torch.empty(description["tensors"][name]["shape"])
        for flat, part in places[name]:
            target = whole.view(-1)[part.tensor_start : part.tensor_start + part.numel]
            target.copy_(flat.detach()[part.start : part.start + part.numel])
        return whole

    return read


def _load(path: Path) -> dict:
    """A file of DeepSpeed's, memory-mapped: tensors are read from disk when they are used."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
