"""Spread work over processes; the results and their order do not depend on the number of processes."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from threading import Thread


@contextmanager
def worker_pool(num_workers: int) -> Iterator[Callable[[Callable, Iterable], Iterator]]:
    """Yield a `map` that spreads its items over processes and gives the results in the order of the items.

    The processes start at once, so that the caller can work meanwhile. With one worker, this process does it all.
    """
    if num_workers == 1:
        yield map
        return
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        for _ in range(num_workers):
            pool.submit(int)
        yield partial(_ordered_map, pool, num_workers)


def _end_with_parent() -> None:
    """Exit when the parent does. Otherwise a worker whose parent was killed would wait forever and keep its memory."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def _ordered_map(pool: ProcessPoolExecutor, num_workers: int, function: Callable, items: Iterable) -> Iterator:
    pending: deque = deque()  # at most two items per worker, so that memory stays constant
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise OSError("a worker process was killed, probably because memory ran out; try fewer --workers") from error
    finally:
        for future in pending:
            future.cancel()
