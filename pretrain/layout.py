"""The dp x tp grid of ranks: process groups, the device, DeepSpeed's `mpu`, and the launcher's environment, all in one
place.

Ranks are numbered as Megatron numbers them: `torch.arange(world).view(dp, tp)`. A row is one tensor-parallel group
(neighbours, so one node), a column one data-parallel group.
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

with warnings.catch_warnings():  # it warns of every optional package that is not installed; none is needed here
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state

ANSWER_S = 5  # that ranks are given to say that they are there, when one is missed
LONE_RANK = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
LAUNCHERS_VARIABLES = (*LONE_RANK, "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
LONGEST_BUILD = 600  # seconds: a lock of torch's compiler that is older was left by a process that was killed


@dataclass(frozen=True)
class Layout:
    """Where this rank stands. Also the `mpu` that DeepSpeed asks for its groups, under the names it calls."""

    dp_size: int
    tp_size: int
    dp_rank: int
    tp_rank: int
    device: torch.device
    sequence_parallel: bool = False  # activations between tensor-parallel products are split over tp, by tokens

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
        return parallel_state.get_tensor_model_parallel_group()

    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_group = get_model_parallel_group

    def sum_over_data_parallel(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a small tensor over the data-parallel ranks, in float64 (float32 on devices without it is never needed
        here).
        """
        total = values.to(self.device, torch.float64)
        dist.all_reduce(total, group=self.get_data_parallel_group())
        return total

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a small float64 tensor over all ranks: how they agree, to stop at the same step for one."""
        total = values.to(self.device)
        dist.all_reduce(total)
        return total

    def gather(self, value: object) -> list:
        """A picklable value of every rank, by rank."""
        if self.dp_size * self.tp_size == 1:
            return [value]  # not a copy of it
        values = [None] * (self.dp_size * self.tp_size)
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        dist.barrier()

    def silent_ranks(self) -> list[int]:
        """The ranks that no longer answer. Asked for by all that a collective failed on: each leaves word in the
        group's store, and reads after a while who has not. Rank 0 keeps the store.
        """
        store, silent = dist.distributed_c10d._get_default_store(), [0]

        def ask() -> None:
            try:
                store.set(f"heard from {self.rank}", "")
                time.sleep(ANSWER_S)
                ranks = range(self.dp_size * self.tp_size)
                silent[:] = [rank for rank in ranks if not store.check([f"heard from {rank}"])]
            except dist.DistError:
                pass  # rank 0 is gone

        asking = threading.Thread(target=ask, daemon=True)  # without an answer, for ever
        asking.start()
        asking.join(2 * ANSWER_S)
        if self.rank == 0:
            time.sleep(ANSWER_S)  # for the others to read
        return list(silent)

    def close(self) -> None:
        """Leaves the process groups, so that a rank exits without a warning."""
        dist.barrier()
        dist.destroy_process_group()


def is_about_another_rank(error: RuntimeError) -> bool:
    """Whether a collective failed: torch has a class for NCCL's errors, and for gloo's their own words."""
    return isinstance(error, dist.DistBackendError) or "gloo" in str(error)


def rank_environment() -> dict[str, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK from `deepspeed`/`torchrun`, from srun with one task a rank, or of a lone
    process.

    Sets what `torch.distributed` and DeepSpeed read from the environment, and nothing else reads the environment.
    """
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:
        for name, slurm_name in (
            ("RANK", "SLURM_PROCID"),
            ("WORLD_SIZE", "SLURM_NTASKS"),
            ("LOCAL_RANK", "SLURM_LOCALID"),
        ):
            env[name] = env[slurm_name]
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing:
            raise ValueError(
                f"under srun {' and '.join(missing)} must be exported: the address of the first node and a free port"
            )
    if "RANK" not in env:
        # Port 0: the kernel chooses one when it is opened, so no other process can take it before.
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    env.setdefault(
        "CUDA_DEVICE_MAX_CONNECTIONS", "1"
    )  # so that Megatron's all-reduces start before the products they hide
    _keep_operators_apart()
    return {name: int(env[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def _keep_operators_apart() -> None:
    """DeepSpeed compiles operators at first use. Each environment keeps its own, so that two of them do not overwrite
    each other's, and builds with its own ninja: another version takes what this one built for out of date. A lock that
    a killed build left is removed: torch would wait for it for ever.
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
            pass  # another rank was faster


def environment_side_by_side(index: int, count: int) -> dict[str, str]:
    """The environment of one of `count` independent processes on this machine: its share of the cores, one GPU of those
    that there are, and nothing of the job around them, of which they are no ranks.
    """
    shared = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    if num_gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_gpus)))).split(",")
        shared["CUDA_VISIBLE_DEVICES"] = visible[index % len(visible)]
    own = {name: value for name, value in os.environ.items() if name not in LAUNCHERS_VARIABLES}
    return {**own, **shared}


def check_layout(world_size: int, tensor_parallel: int, sequence_parallel: bool = False) -> None:
    """Raises ValueError unless the ranks form a whole dp x tp grid, with a tp to split sequences over if that is
    wanted.
    """
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
    """Raise ValueError for fp16 without a GPU, since a CPU does not compute in it."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("fp16.enabled=true needs a GPU, and there is none here; choose bf16, or neither of them")


def make_deterministic() -> None:
    """Makes the GPU repeat itself bit for bit, at some cost in speed; to be called before its first product. The CPU
    does so anyway.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS with one fixed workspace
    torch.use_deterministic_algorithms(True)


def _leave_grid() -> None:
    """Megatron forgets its groups; their sockets and threads (50 of these a grid under gloo) stay until they are
    destroyed.
    """
    if dist.is_initialized():
        for group in dict.fromkeys(parallel_state._global_process_group_list):
            if group is not None:  # the default group, which stays
                dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def init_layout(tensor_parallel: int = 1, sequence_parallel: bool = False, timeout_min: float = 10) -> Layout:
    """Joins the process group (gloo on CPUs, NCCL on GPUs) and builds the grid; may be called again for another grid of
    the same ranks. A rank that waits for the others longer than `timeout_min` minutes raises RuntimeError.
    """
    ranks = rank_environment()
    check_layout(ranks["WORLD_SIZE"], tensor_parallel)
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:  # the ranks of one host share its cores
        names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")  # torchrun's, deepspeed's, srun's
        num_local_ranks = next((int(os.environ[name]) for name in names if name in os.environ), 1)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_local_ranks))
    return _build_grid(ranks, tensor_parallel, sequence_parallel, timeout_min)


def init_lone_layout() -> Layout:
    """The layout of a tool that is one process, whatever a launcher's or a batch job's variables around it say."""
    return _build_grid(LONE_RANK, 1, False, 10, dist.TCPStore("127.0.0.1", 0, is_master=True))


def _build_grid(
    ranks: dict[str, int],
    tensor_parallel: int,
    sequence_parallel: bool,
    timeout_min: float,
    store: dist.Store | None = None,  # None: the launcher's, which the environment names
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
