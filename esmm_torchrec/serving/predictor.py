"""Scores raw rows in one process: requests at once, files block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from esmm_torchrec.data.encoding import RowEncoder
from esmm_torchrec.data.sources.bad_rows import BadRows
from esmm_torchrec.data.sources.raw_tables import Frame
from esmm_torchrec.errors import OptionError
from esmm_torchrec.serving.inputs import InputEncoder, Inputs, Request
from esmm_torchrec.serving.package import PREPROCESSING, Package
from esmm_torchrec.serving.scored_rows import ScoredRows, read_rows, score_columns

BATCH_SIZE = 8192


class Predictor:
    """A model that scores raw rows. It is thread-safe.

    Example::

        predictor = Predictor("runs/mine")
        scores = predictor.score(frame)  # columns sample_id, pctr, pcvr, pctcvr
        predictor.predict({"user": 7, "item": [3, 5]})  # {"pctr": array([…]), …}

    Args:
        model: the folder of a run, or of an exported model.
        step: step of the checkpoint of a run; None: that of the model.
        calibrated: apply the calibration that 'calibrate' fitted to a run. For a package, this was
            decided at export.
        device: device of the model of a run; an exported model runs on its device of export.
        runners: number of threads that can run a compiled program at the same time.

    Raises:
        RunError: the folder is neither, is broken, or was exported for another machine; or the run
            lacks the checkpoint or a calibration of it.
        OptionError: `calibrated` is set for a package without a calibration.
    """

    def __init__(
        self,
        model: Path | str,
        *,
        step: int | None = None,
        calibrated: bool = False,
        device: torch.device | str = "cpu",
        runners: int = 4,
    ) -> None:
        path = Path(model)
        self.package: Package | None = None
        """The exported model; None for a run."""
        if Package.is_one(path):
            package = Package.open(path)
            if calibrated and package.calibration is None:
                raise OptionError(
                    f"{path} is an exported model without a calibration; export it again with "
                    "`calibrated`, or leave `calibrated` out"
                )
            self._open_package(package, runners)
        else:
            self._open_run(path, step, torch.device(device), calibrated)
        self.encoder = InputEncoder(self._rows)
        """Encoder of raw values as inputs of the program."""
        if self.package is not None:
            self.package.check_example(self.predict)

    def _open_package(self, package: Package, runners: int) -> None:
        self.package = package
        self.device = torch.device(package.device)
        self.step, self.tasks = package.step, package.tasks
        self._rows = RowEncoder.load(package.path / PREPROCESSING)
        run = package.load(runners=runners)
        self._run = lambda tensors: dict(zip(package.signature.outputs, run(tensors), strict=True))

    def _open_run(
        self, path: Path, step: int | None, device: torch.device, calibrated: bool
    ) -> None:
        # Importing TorchRec takes seconds.
        from esmm_torchrec.runs.run_folder import RunFolder  # noqa: PLC0415
        from esmm_torchrec.serving.trained_program import trained_program  # noqa: PLC0415

        run = RunFolder.open(path)
        program, self.task, self.step = trained_program(
            run, step=step, device=device, calibrated=calibrated
        )
        self.device, self.tasks = device, run.schema.tasks
        self._rows = RowEncoder.load(run.preprocessing)
        self._run = lambda tensors: program.outputs(*tensors)

    def predict(self, request: Request | Sequence[Request]) -> dict[str, np.ndarray]:
        """Scores the impressions of a request.

        Args:
            request: raw values by raw column, one for each of B impressions or one for all of them;
                or a list of such requests, one per impression; see `InputEncoder`. An omitted
                value is missing.

        Returns:
            float32 (B,) by column: pctr, pcvr and pctcvr, except those the model does not predict.

        Raises:
            DataError: a name is not a raw column, or a value is invalid.
        """
        return self.run_program(self.encode(request))

    def encode(
        self, request: Request | Sequence[Request], *, max_size: int | None = None
    ) -> Inputs:
        """Encodes a request as inputs of the program; see `predict`.

        Raises:
            TooManyRows: there are more than `max_size` impressions.
            DataError: same as in `predict`.
        """
        return self.encoder.encode(request, max_size=max_size)

    def run_program(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """Returns the scores of encoded impressions, float32 (B,) by column."""
        if inputs.size == 0:
            return {name: scores[:0] for name, scores in self.predict({}).items()}
        with torch.inference_mode():
            scores = self._run(inputs.tensors(self.encoder.signature, self.device))
        return {name: score.cpu().numpy() for name, score in scores.items()}

    def score(self, rows: Frame | Sequence[Frame], *, batch_size: int = BATCH_SIZE) -> pd.DataFrame:
        """Scores raw rows, in order.

        Args:
            rows: one or several DataFrames, Arrow tables or files, as in `prepare_table`, with the
                columns from which the training data were prepared; labels are not needed.
            batch_size: number of impressions scored at a time.

        Returns:
            sample_id int64 (the row number if the data has none); pctr, pcvr and pctcvr float32,
            NaN if the model does not predict them. The index of a DataFrame is kept.

        Raises:
            DataError: a column is missing, a value is invalid, or there are no rows.
        """
        parts = [
            score_columns(block.scores, self.tasks, block.read.sample_ids)
            for block in self.score_blocks(rows, batch_size=batch_size)
        ]
        scored = pa.concat_tables(parts).to_pandas()
        if isinstance(rows, pd.DataFrame):
            scored.index = rows.index
        return scored

    def score_blocks(
        self,
        rows: Frame | Sequence[Frame],
        *,
        keep: Sequence[str] = (),
        bad_rows: BadRows | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Iterator[ScoredRows]:
        """Scores raw rows block by block, in bounded memory.

        Args:
            rows: same as in `score`.
            keep: further columns to return with the scores.
            bad_rows: counter of the rows that cannot be scored; None allows none.
            batch_size: number of impressions scored at a time.

        Raises:
            DataError: a column is missing, a value is invalid and may not be skipped, or there are
                no rows.
        """
        for read in read_rows(self._rows, rows, keep=keep, bad_rows=bad_rows):
            inputs, counts = self.encoder.encode_rows(read)
            parts = [
                self.run_program(batch)
                for batch in inputs.batches(self.encoder.signature, batch_size)
            ]
            scores = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            yield ScoredRows(read, scores, counts)
