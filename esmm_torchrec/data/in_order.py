"""Parallel work in threads, with results in the order of the inputs."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

MAX_THREADS = 8

T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], inputs: Iterable[T]) -> Generator[R, None, None]:
    """Yields `work` of each input, computed in threads and at most a few results ahead. The inputs
    are iterated on the caller's thread."""
    threads = min(os.cpu_count() or 1, MAX_THREADS)
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for value in inputs:
                pending.append(pool.submit(work, value))
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
