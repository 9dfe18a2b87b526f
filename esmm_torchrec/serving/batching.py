"""Batches concurrent requests.

A program scores a batch in little more time than one impression. So a request waits a moment for
others; all of them are encoded and scored in one worker thread, and each gets its own scores or its
own error.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from esmm_torchrec.errors import DataError, EsmmTorchrecError
from esmm_torchrec.serving.inputs import Inputs, Request
from esmm_torchrec.serving.predictor import Predictor

MAX_TOGETHER = 256
"""Maximum number of requests that are scored together."""

_COLUMNS = (list, pa.Array, pa.ChunkedArray)


class Overloaded(EsmmTorchrecError):
    """Too many requests are waiting."""


class Answer(NamedTuple):
    """The scores of a request."""

    scores: dict[str, np.ndarray]
    """float32 (B,) by column."""
    model: str
    """Fingerprint of the package that computed them."""


@dataclass
class _Waiting:
    request: Request | Sequence[Request]
    answer: asyncio.Future[Answer]


class Batcher:
    """Scores requests in batches.

    Args:
        model: returns the predictor to use; called once per batch.
        window_seconds: time that the first request of a batch waits for others.
        max_rows: maximum number of impressions per batch and per request.
        max_waiting: maximum number of waiting requests.
        observe: called with the number of impressions of each batch.
    """

    def __init__(
        self,
        model: Callable[[], Predictor],
        *,
        window_seconds: float,
        max_rows: int,
        max_waiting: int,
        observe: Callable[[int], None],
    ) -> None:
        self._model = model
        self._window_seconds = window_seconds
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._observe = observe
        self._waiting: deque[_Waiting] = deque()
        self._came = asyncio.Event()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="scorer")
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        return len(self._waiting)

    async def __aenter__(self) -> Batcher:
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._worker.shutdown()

    async def score(self, request: Request | Sequence[Request]) -> Answer:
        """Scores a request; see `Predictor.predict`.

        Raises:
            DataError: the request cannot be scored.
            Overloaded: too many requests are waiting.
        """
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests wait; try again later")
        waiting = _Waiting(request, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._came.set()
        return await waiting.answer

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._came.wait()
            if self._window_seconds > 0:
                await asyncio.sleep(self._window_seconds)
            self._came.clear()
            while self._waiting:
                taken = self._next()
                outcomes = await loop.run_in_executor(self._worker, self._score, taken)
                for waiting, outcome in zip(taken, outcomes, strict=True):
                    if waiting.answer.done():  # the caller no longer waits
                        continue
                    if isinstance(outcome, BaseException):
                        waiting.answer.set_exception(outcome)
                    else:
                        waiting.answer.set_result(outcome)

    def _next(self) -> list[_Waiting]:
        """Takes waiting requests in order, up to about the impressions of one batch."""
        taken: list[_Waiting] = []
        rows = 0
        while self._waiting and len(taken) < MAX_TOGETHER:
            rows += _size(self._waiting[0].request)
            if taken and rows > self._max_rows:
                break
            waiting = self._waiting.popleft()
            if not waiting.answer.done():
                taken.append(waiting)
        return taken

    def _score(self, taken: list[_Waiting]) -> list[Answer | BaseException]:
        """Returns the answer to each request, or its error; runs in the worker thread."""
        try:
            return self._answers(self._model(), [waiting.request for waiting in taken])
        except BaseException as error:
            return [error] * len(taken)

    def _answers(
        self, predictor: Predictor, requests: list[Request | Sequence[Request]]
    ) -> list[Answer | BaseException]:
        assert predictor.package is not None
        model = predictor.package.fingerprint
        parts, sizes = self._encoded(predictor, requests)
        scores: list[dict[str, np.ndarray]] = []
        if parts:
            together = Inputs.concatenate(parts)
            for batch in together.batches(predictor.encoder.signature, self._max_rows):
                scores.append(predictor.run_program(batch))
                self._observe(batch.size)
        names = scores[0] if scores else ()
        by_name = {name: np.concatenate([one[name] for one in scores]) for name in names}
        answers: list[Answer | BaseException] = []
        start = 0
        for size in sizes:
            if isinstance(size, DataError):
                answers.append(size)
                continue
            own = {name: one[start : start + size] for name, one in by_name.items()}
            answers.append(Answer(own, model))
            start += size
        return answers

    def _encoded(
        self, predictor: Predictor, requests: list[Request | Sequence[Request]]
    ) -> tuple[list[Inputs], list[int | DataError]]:
        """Returns the encoded impressions, and for each request their number or its error."""
        of_rows = [one for one in requests if not isinstance(one, Mapping)]
        sizes = list(map(len, of_rows))
        if len(requests) == len(of_rows) > 1 and max(sizes) <= self._max_rows:
            # All rows are encoded at once, unless one of them is invalid.
            with suppress(DataError):
                return [predictor.encode(list(chain.from_iterable(of_rows)))], [*sizes]
        parts: list[Inputs] = []
        outcomes: list[int | DataError] = []
        for request in requests:
            try:
                inputs = predictor.encode(request, max_size=self._max_rows)
                parts.append(inputs)
                outcomes.append(inputs.size)
            except DataError as error:
                outcomes.append(error)
        return parts, outcomes


def _size(request: Request | Sequence[Request]) -> int:
    """Returns an upper bound of the number of impressions of a request."""
    if not isinstance(request, Mapping):
        return len(request)
    columns = (values for values in request.values() if isinstance(values, _COLUMNS))
    several = map(len, columns)
    return max(several, default=1)
