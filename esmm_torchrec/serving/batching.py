"""Requests that come at the same time, scored together.

A program takes a batch in little more time than one impression. So a request waits a moment for
others; all of them are encoded and scored in one worker thread, and each gets its own scores or its
own error.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from esmm_torchrec.errors import DataError, EsmmTorchrecError
from esmm_torchrec.serving.inputs import Inputs, Request
from esmm_torchrec.serving.predictor import Predictor


class Overloaded(EsmmTorchrecError):
    """More requests wait than may."""


class TooManyRows(DataError):
    """A request has more impressions than a batch may have."""


class Answer(NamedTuple):
    """The scores of a request."""

    scores: dict[str, np.ndarray]
    """float32 (B,) by column."""
    model: str
    """Fingerprint of the package that gave them."""


@dataclass
class _Waiting:
    request: Request | Sequence[Request]
    answer: asyncio.Future[Answer]


class Batcher:
    """Scores requests in batches.

    Args:
        model: gives the predictor to use; asked once per batch.
        window_seconds: how long the first request of a batch waits for others.
        max_rows: impressions of a batch and of a request.
        max_waiting: requests that may wait.
        observe: called with the impressions of each batch.
    """

    def __init__(
        self,
        model: Callable[[], Predictor],
        *,
        window_seconds: float,
        max_rows: int,
        max_waiting: int,
        observe: Callable[[int], None] = lambda _: None,
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
        """Requests that wait."""
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
        """The scores of a request; see `Predictor.predict`.

        Raises:
            DataError: the request cannot be scored.
            Overloaded: too many requests wait.
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
                taken = [self._waiting.popleft() for _ in range(len(self._waiting))]
                await loop.run_in_executor(self._worker, self._score, loop, taken)

    def _score(self, loop: asyncio.AbstractEventLoop, taken: list[_Waiting]) -> None:
        """In the worker: encodes all, scores them batch by batch."""
        try:
            predictor = self._model()
            batch: list[tuple[_Waiting, Inputs]] = []
            rows = 0
            for waiting in taken:
                if waiting.answer.cancelled():
                    continue
                try:
                    inputs = predictor.encode(waiting.request)
                    if inputs.size > self._max_rows:
                        raise TooManyRows(
                            f"the request has {inputs.size} impressions and may have "
                            f"{self._max_rows}; divide it"
                        )
                except DataError as error:
                    _settle(loop, waiting, error)
                    continue
                if rows + inputs.size > self._max_rows:
                    self._run(loop, predictor, batch)
                    batch, rows = [], 0
                batch.append((waiting, inputs))
                rows += inputs.size
            self._run(loop, predictor, batch)
        except BaseException as error:
            for waiting in taken:
                _settle(loop, waiting, error)

    def _run(
        self,
        loop: asyncio.AbstractEventLoop,
        predictor: Predictor,
        batch: list[tuple[_Waiting, Inputs]],
    ) -> None:
        if not batch:
            return
        together = Inputs.concatenate([inputs for _, inputs in batch])
        scores = predictor.run_program(together)
        self._observe(together.size)
        start = 0
        assert predictor.package is not None
        for waiting, inputs in batch:
            own = {name: one[start : start + inputs.size] for name, one in scores.items()}
            _settle(loop, waiting, Answer(own, predictor.package.fingerprint))
            start += inputs.size


def _settle(
    loop: asyncio.AbstractEventLoop, waiting: _Waiting, outcome: Answer | BaseException
) -> None:
    def settle() -> None:
        if waiting.answer.done():
            return
        if isinstance(outcome, BaseException):
            waiting.answer.set_exception(outcome)
        else:
            waiting.answer.set_result(outcome)

    loop.call_soon_threadsafe(settle)
