"""Work spread over processes, in an order and with results that do not depend on how many there are."""

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
    """A `map` in the order of the items, over processes that stay until the block ends. They start at once, while the
    caller does what one process has to do.
    """
    if num_workers == 1:
        yield map
        return
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        for _ in range(num_workers):
            pool.submit(int)
        yield partial(_ordered_map, pool, num_workers)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next item for ever, and keep its memory."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def _ordered_map(pool: ProcessPoolExecutor, num_workers: int, function: Callable, items: Iterable) -> Iterator:
    """At most two items a worker wait, so that memory stays constant."""
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise OSError("a worker process was killed, probably for want of memory; try fewer --workers") from error
    finally:
        for future in waiting:
            future.cancel()
