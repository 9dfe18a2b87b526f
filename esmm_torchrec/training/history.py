"""What is measured while a model trains: history.jsonl and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter

from esmm_torchrec.runs.run_folder import RunFolder


class History:
    """Writes one line of figures per step that is logged; on rank 0.

    Args:
        run: whose history is written.
        after: the step that training continues from. An interrupted run may have logged later
            steps; they are dropped because they are done again.
    """

    def __init__(self, run: RunFolder, *, after: int) -> None:
        run.drop_history(after)
        self._file = run.history.open("a")
        self._board = SummaryWriter(str(run.path / "tensorboard"), purge_step=after + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds a line."""
        self._file.write(json.dumps({"step": step} | dict(figures), allow_nan=False) + "\n")
        self._file.flush()
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Ends the files."""
        self._file.close()
        self._board.close()
