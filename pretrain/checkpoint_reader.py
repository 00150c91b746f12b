"""Find, verify and read checkpoints tensor by tensor, with torch alone."""

import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data_prep.files import read_json, sha256_file

if TYPE_CHECKING:
    from pretrain.layout import Layout

STEP_FOLDER = re.compile(r"step_\d{8}")
MOMENTS = ("exp_avg", "exp_avg_sq")
CHECKSUMS = "SHA256SUMS"
# All classes that DeepSpeed pickles into a checkpoint.
DEEPSPEED_CLASSES = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


class _Unread:
    """Replaces DEEPSPEED_CLASSES, whose objects are not needed to read tensors."""

    def __init__(self, *_: object):
        pass


STAND_INS = tuple((_Unread, name) for name in DEEPSPEED_CLASSES)


def damaged_files(folder: Path, layout: "Layout | None" = None) -> list[str]:
    """The problems of a checkpoint's files, one line each. With a layout the ranks share the work: collective."""
    path = folder / CHECKSUMS
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = [line.partition("  ") for line in text.splitlines()]
    problems = []
    if not text.endswith("  checkpoint.json\n"):
        problems.append(f"{CHECKSUMS} is missing or cut short")
        lines = lines[:-1]  # the last one may hold half a name
    if not all(len(digest) == 64 and name for digest, _, name in lines):
        problems.append(f"{CHECKSUMS} has a line without a checksum and a name")
        lines = []
    for digest, _, name in lines[layout.rank :: layout.dp_size * layout.tp_size] if layout else lines:
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif sha256_file(folder / name) != digest:
            problems.append(f"{name} does not match its checksum")
    if layout is None:
        return problems
    return list(dict.fromkeys(problem for found in layout.gather(problems) for problem in found))


def require_whole(folder: Path, layout: "Layout | None" = None) -> None:
    """Raise ValueError, naming the files, if a checkpoint is damaged. Collective if a layout is given."""
    if problems := damaged_files(folder, layout):
        raise ValueError(f"{folder} is damaged: {', '.join(problems)}; name another checkpoint, or restore it")


def fragments_file(folder: Path, dp_rank: int, tp_rank: int) -> Path:
    """The file that locates the fragments of tensors in the partitions of one rank."""
    return folder / f"fragments_dp_{dp_rank}_tp_{tp_rank}.json"


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    folder = Path(run_folder) / "checkpoints"
    return sorted(path for path in folder.glob("step_*") if STEP_FOLDER.fullmatch(path.name))


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself if it is a checkpoint, else the newest checkpoint of a run folder. ValueError if there is none."""
    path = Path(path)
    if (path / "checkpoint.json").is_file():
        return path
    finished = list_checkpoints(path)
    if not finished:
        raise ValueError(
            f"{path}: no checkpoint here; give a run folder that contains checkpoints/step_*, or one of those folders"
        )
    return finished[-1]


def run_folder_of(checkpoint: Path) -> Path:
    """The run folder of a checkpoint. It holds the model's config.json and the vocabulary."""
    return checkpoint.resolve().parent.parent


def tensor_reader(folder: Path) -> tuple[list[str], Callable[..., Tensor]]:
    """The names of a checkpoint's tensors, and a function (name, kind) -> whole float32 tensor, for any layout.

    `kind` is "weight", the default, or one of MOMENTS. The slices are merged over tp; vocabulary padding is kept.
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
    """A function (name, kind) -> this tensor-parallel rank's float32 slice, read from memory-mapped files."""
    places: dict[str, list[tuple[dict, dict]]] = {}  # tensor -> (partition, fragment) of each of its parts
    for dp_rank in range(description["dp_size"] if description["zero_stage"] else 1):
        fragments = read_json(fragments_file(folder, dp_rank, tp_rank))
        partitions = _partitions(folder, description["zero_stage"], dp_rank, tp_rank, fragments)
        for partition, parts in zip(partitions, fragments, strict=True):
            for part in parts:
                places.setdefault(part["name"], []).append((partition, part))

    def read(name: str, kind: str) -> Tensor:
        whole = torch.zeros(description["tensors"][name]["shape"])
        for partition, part in places[name]:
            if kind in partition:  # before the first step there are no moments
                source = partition[kind].detach().view(-1)[part["start"] :][: part["numel"]]
                whole.view(-1)[part["tensor_start"] :][: part["numel"]].copy_(source)
        return whole

    return read


def _partitions(folder: Path, zero_stage: int, dp_rank: int, tp_rank: int, fragments: list) -> list[dict]:
    """The "weight" and, after the first step, the MOMENTS of each partition of one rank's optimizer."""
    if zero_stage:
        (path,) = folder.glob(f"*zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_optim_states.pt")
        saved = load_file(path, mmap=True)["optimizer_state_dict"]
        weights = saved["fp32_flat_groups" if zero_stage == 3 else "single_partition_of_fp32_groups"]
        moments = saved["optimizer_state_dict" if zero_stage == 3 else "base_optimizer_state"]["state"]
    else:
        states = load_file(folder / f"mp_rank_{tp_rank:02d}_model_states.pt", mmap=True)
        saved = states["optimizer"]
        if "fp32_groups" in saved:  # 16 bit: the optimizer has whole fp32 copies
            weights = [weight for group in saved["fp32_groups"] for weight in group]
            moments = saved["optimizer_state_dict"]["state"]
        else:
            weights = [states["module"][part["name"]] for (part,) in fragments]
            moments = saved["state"]
    return [{"weight": weight, **moments.get(index, {})} for index, weight in enumerate(weights)]


def load_file(
    path: str | Path, map_location: object = "cpu", mmap: bool = False, classes: Sequence = STAND_INS
) -> dict:
    """The content of a DeepSpeed file. With `mmap`, tensors are read from disk when they are used.

    Raises ValueError for a pickle with classes other than `classes` and torch's own, because it could run code.
    """
    try:
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        names = re.findall(r"GLOBAL (\S+)", str(error)) or ["an unknown object"]
        raise ValueError(
            f"{path}: refused because it contains {names[0]}; our checkpoints never do, and loading it could run code"
        ) from error
