"""The dp x tp grid of ranks: process groups, the device, DeepSpeed's `mpu`, and the launcher's environment.

Ranks are numbered as Megatron numbers them: `torch.arange(world).view(dp, tp)`. A row is one tensor-parallel group
(neighbouring ranks, so on one node); a column is one data-parallel group.
"""

import datetime
import os
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

with warnings.catch_warnings():  # megatron-core warns about missing optional packages; none is needed
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state

ANSWER_S = 5  # how long `silent_ranks` waits for an answer
LONE_RANK = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
SLURM_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
LAUNCHERS_VARIABLES = (*LONE_RANK, "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
LONGEST_BUILD = 600  # seconds; an older lock of torch's compiler was left by a killed process


@dataclass(frozen=True)
class Layout:
    """This rank's place in the grid, and the `mpu` whose methods DeepSpeed calls for its groups."""

    dp_size: int
    tp_size: int
    dp_rank: int
    tp_rank: int
    device: torch.device
    sequence_parallel: bool = False  # between tensor-parallel products, tokens are split over tp

    @property
    def world_size(self) -> int:
        return self.dp_size * self.tp_size

    @property
    def rank(self) -> int:
        return self.dp_rank * self.tp_size + self.tp_rank

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """The tensor-parallel group of this rank."""
        return parallel_state.get_tensor_model_parallel_group()

    def get_data_parallel_world_size(self) -> int:
        return self.dp_size

    def get_data_parallel_rank(self) -> int:
        return self.dp_rank

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        return self.tp_size

    def get_model_parallel_rank(self) -> int:
        return self.tp_rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tp_group

    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_group = get_model_parallel_group

    def sum_over_data_parallel(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a small tensor over the data-parallel ranks, in float64."""
        total = values.to(self.device, torch.float64)
        dist.all_reduce(total, group=self.get_data_parallel_group())
        return total

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a small float64 tensor over all ranks."""
        total = values.to(self.device)
        dist.all_reduce(total)
        return total

    def gather(self, value: object) -> list:
        """The values of all ranks, in the order of ranks. `value` must be picklable; a single rank does not copy it."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        dist.barrier()

    def silent_ranks(self) -> list[int]:
        """The ranks that no longer answer after a collective has failed.

        Every surviving rank calls this. It sets a key in the group's store, waits, and looks for the other ranks' keys.
        Rank 0 hosts the store, so if the store does not answer, rank 0 is the silent one.
        """
        store, silent = dist.distributed_c10d._get_default_store(), [0]

        def ask() -> None:
            try:
                store.set(f"heard from {self.rank}", "")
                time.sleep(ANSWER_S)
                silent[:] = [rank for rank in range(self.world_size) if not store.check([f"heard from {rank}"])]
            except dist.DistError:
                pass  # rank 0 has ended

        asking = threading.Thread(target=ask, daemon=True)  # the store may never answer
        asking.start()
        asking.join(2 * ANSWER_S)
        if self.rank == 0:
            time.sleep(ANSWER_S)  # keep the store open while the others read
        return list(silent)

    def close(self) -> None:
        """Leave the process groups, so that the rank exits without a warning. Collective."""
        dist.barrier()
        dist.destroy_process_group()


def is_about_another_rank(error: RuntimeError) -> bool:
    """Whether a collective failed. NCCL's errors have a class; gloo's are recognised by their text."""
    return isinstance(error, dist.DistBackendError) or "gloo" in str(error)


def rank_environment() -> dict[str, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK from `deepspeed`, `torchrun` or srun (one task per rank), or of a single process.

    Sets the variables that torch.distributed and DeepSpeed read. ValueError if srun lacks MASTER_ADDR or MASTER_PORT.
    """
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:
        env.update({name: env[slurm_name] for name, slurm_name in SLURM_NAMES.items()})
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing:
            raise ValueError(
                f"under srun {' and '.join(missing)} must be exported: the address of the first node and a free port"
            )
    if "RANK" not in env:
        # With port 0 the kernel chooses a free port when it opens it, so no other process can take the port first.
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    # Megatron's all-reduces must start before the products that they overlap with.
    env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _separate_compiled_operators()
    return {name: int(env[name]) for name in LONE_RANK}


def _separate_compiled_operators() -> None:
    """Give each Python environment its own folder and its own ninja for DeepSpeed's compiled operators.

    Otherwise two environments overwrite each other's operators, and another version of ninja compiles all of them
    again. Also removes locks of killed builds, on which torch would wait forever.
    """
    programs, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    if Path(programs, "ninja").exists() and path.split(os.pathsep)[0] != programs:
        os.environ["PATH"] = os.pathsep.join([programs, path])
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "torch_extensions")))
    for lock in Path(os.environ.get("TORCH_EXTENSIONS_DIR", sys.prefix)).glob("*/lock"):
        try:
            if time.time() - lock.stat().st_mtime > LONGEST_BUILD:
                lock.unlink()
        except FileNotFoundError:
            pass  # another rank removed it first


def environment_side_by_side(index: int, count: int) -> dict[str, str]:
    """The environment of one of `count` independent processes on this machine: a share of the cores, one GPU, and none
    of the launcher's variables, because the process is not a rank of the surrounding job.
    """
    own = {name: value for name, value in os.environ.items() if name not in LAUNCHERS_VARIABLES}
    own["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    if num_gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_gpus)))).split(",")
        own["CUDA_VISIBLE_DEVICES"] = visible[index % len(visible)]
    return own


def check_layout(world_size: int, tensor_parallel: int, sequence_parallel: bool = False) -> None:
    """Raise ValueError unless the ranks form a whole dp x tp grid; sequence parallelism needs tp above 1."""
    if tensor_parallel < 1 or world_size % tensor_parallel:
        fitting = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ValueError(
            f"{world_size} ranks cannot form groups of --tensor-parallel {tensor_parallel}; choose from {fitting}"
        )
    if sequence_parallel and tensor_parallel == 1:
        raise ValueError(
            "--sequence-parallel splits tokens over the ranks of --tensor-parallel, which is 1; set it to 2 or more, or"
            " leave --sequence-parallel out"
        )


def check_device_precision(precision: str) -> None:
    """Raise ValueError for fp16 without a GPU, because CPUs do not support it."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("fp16.enabled=true needs a GPU, but none is available; enable bf16, or neither (float32)")


def make_deterministic() -> None:
    """Make a GPU as reproducible as a CPU, at some cost in speed. Call it before the first matrix product."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS with one fixed workspace
    torch.use_deterministic_algorithms(True)


def init_layout(tensor_parallel: int = 1, sequence_parallel: bool = False, timeout_min: float = 10) -> Layout:
    """Join the process group (gloo on CPUs, NCCL on GPUs) and build the grid.

    Can be called again for another grid of the same ranks. A wait of more than `timeout_min` minutes is a RuntimeError.
    """
    ranks = rank_environment()
    check_layout(ranks["WORLD_SIZE"], tensor_parallel)
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:  # the ranks of one host share its cores
        names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")  # torchrun's, deepspeed's, srun's
        num_local_ranks = next((int(os.environ[name]) for name in names if name in os.environ), 1)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_local_ranks))
    return _build_grid(ranks, tensor_parallel, sequence_parallel, timeout_min)


def init_lone_layout() -> Layout:
    """The layout of a single-process tool, whatever variables a launcher or a batch job has set."""
    return _build_grid(LONE_RANK, store=dist.TCPStore("127.0.0.1", 0, is_master=True))


def _build_grid(
    ranks: dict[str, int],
    tensor_parallel: int = 1,
    sequence_parallel: bool = False,
    timeout_min: float = 10,
    store: dist.Store | None = None,  # None: the one that the launcher's environment names
) -> Layout:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", ranks["LOCAL_RANK"]) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if parallel_state.model_parallel_is_initialized():
        _leave_grid()
    if not dist.is_initialized():
        place = {"store": store, "rank": ranks["RANK"], "world_size": ranks["WORLD_SIZE"]}
        timeout = datetime.timedelta(minutes=timeout_min)
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout, **place)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_min,
    )
    dp_size = ranks["WORLD_SIZE"] // tensor_parallel
    dp_rank, tp_rank = divmod(ranks["RANK"], tensor_parallel)
    return Layout(dp_size, tensor_parallel, dp_rank, tp_rank, device, sequence_parallel and tensor_parallel > 1)


def _leave_grid() -> None:
    """Destroy Megatron's groups. Megatron only drops them, which under gloo leaks 50 threads and sockets per grid."""
    if dist.is_initialized():
        for group in dict.fromkeys(parallel_state._global_process_group_list):
            if group is not None:  # None stands for the default group, which is kept
                dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
