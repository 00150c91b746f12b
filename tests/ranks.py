"""Distributed code, tested for real: `run_ranks(fn, world_size)` calls a function on that many gloo processes.

Starting ranks costs seconds (torch, megatron-core, DeepSpeed), so each world size has one pool of processes that is
made when first asked for and serves every later call of the session. Only the default process group outlives a call:
a job lays its own dp x tp grid over the ranks. A call in which any rank fails costs its pool, because the other ranks
may still be waiting in a collective.
"""

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

# A rank that failed often makes the others fail a moment later; their tracebacks help.
GRACE_S = 1.0


class RankError(RuntimeError):
    """One or more ranks raised, died or did not answer in time; the message holds every known traceback."""


class Pool(NamedTuple):
    processes: list[multiprocessing.process.BaseProcess]
    pipes: list[Connection]


_pools: dict[int, Pool] = {}


def run_ranks(fn: Callable, world_size: int, *args: object, timeout_s: float = 180) -> list:
    """Call `fn(*args)` on `world_size` ranks and return what they returned, by rank.

    `fn` is a module-level function of a test module, `args` and results are picklable. RANK, LOCAL_RANK, WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT are set and the default gloo group is up when it runs. Raises RankError with rank and
    traceback when a rank fails, or when one has not answered after `timeout_s` seconds.
    """
    if world_size not in _pools:
        _pools[world_size] = _start_pool(world_size)
    pool = _pools[world_size]
    job = pickle.dumps((fn, args, timeout_s))
    for rank, pipe in enumerate(pool.pipes):
        try:
            pipe.send_bytes(job)
        except OSError as error:
            _stop_pool(world_size)
            raise RankError(f"rank {rank} of {world_size} died between two calls") from error
    answers, failures = _collect(pool, timeout_s)
    if failures:
        _stop_pool(world_size)
        raise RankError("\n".join(f"rank {rank} of {world_size}: {what}" for rank, what in sorted(failures.items())))
    return [answers[rank] for rank in range(world_size)]


def stop_pools() -> None:
    """Kill every rank of every pool."""
    for world_size in list(_pools):
        _stop_pool(world_size)


atexit.register(stop_pools)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for listener in sockets:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def _collect(pool: Pool, timeout_s: float) -> tuple[dict[int, object], dict[int, str]]:
    """Results and failures by rank: all of them, or those known GRACE_S after the first failure or at `timeout_s`."""
    answers, failures = {}, {}
    waiting = {pipe: rank for rank, pipe in enumerate(pool.pipes)}
    deadline = time.monotonic() + timeout_s
    while waiting and (ready := wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))):
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                succeeded, answer = pickle.loads(pipe.recv_bytes())
            except EOFError:
                succeeded, answer = False, f"died with exit code {_exit_code(pool.processes[rank])}"
            (answers if succeeded else failures)[rank] = answer
        if failures:
            deadline = min(deadline, time.monotonic() + GRACE_S)
    if waiting and not failures:
        failures = {rank: f"no answer after {timeout_s:g} s; its stack is on stderr" for rank in waiting.values()}
    return answers, failures


def _exit_code(process: multiprocessing.process.BaseProcess) -> int | None:
    process.join(GRACE_S)
    return process.exitcode


def _start_pool(world_size: int) -> Pool:
    spawn = multiprocessing.get_context("spawn")
    port = free_ports(1)[0]
    pool = Pool([], [])
    for rank in range(world_size):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(
            target=_serve, args=(theirs, rank, world_size, port), name=f"rank {rank} of {world_size}"
        )
        process.start()
        theirs.close()  # so that a dead rank reads as the end of its pipe
        pool.processes.append(process)
        pool.pipes.append(ours)
    return pool


def _stop_pool(world_size: int) -> None:
    pool = _pools.pop(world_size)
    for process, pipe in zip(pool.processes, pool.pipes, strict=True):
        pipe.close()
        process.kill()
        process.join()


def _serve(pipe: Connection, rank: int, world_size: int, port: int) -> None:
    """One rank's life: set its environment, join the group, answer calls until the parent is gone."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    import torch  # after the environment: torch reads the number of threads when it is imported

    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    while True:
        try:
            job = pipe.recv_bytes()
        except EOFError:
            os._exit(0)  # an orderly exit would wait for ranks that are already gone
        pipe.send_bytes(_answer(job))


def _answer(job: bytes) -> bytes:
    """Run one pickled call; (True, result) or (False, traceback), pickled.

    Plain pickle copies tensors; multiprocessing's own would share their memory and lose them with the rank.
    """
    try:
        fn, args, timeout_s = pickle.loads(job)
        faulthandler.dump_traceback_later(timeout_s * 0.95, exit=False)
        return pickle.dumps((True, fn(*args)))
    except BaseException:  # sys.exit too: the caller must hear of it
        return pickle.dumps((False, traceback.format_exc()))
    finally:
        faulthandler.cancel_dump_traceback_later()
