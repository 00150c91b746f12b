"""Work spread over processes, in an order and with results that do not depend on how many there are."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool


def ordered_map(function: Callable, items: Iterable, num_workers: int) -> Iterator:
    """`map` over processes, in the order of the items; at most two a worker wait, so that memory stays constant."""
    if num_workers == 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as pool:
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
