"""Exports the model of a run as a package that scores raw rows without TorchRec; see `package`."""

from __future__ import annotations

import io
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch

from esmm_torchrec.data.encoding import RowEncoder, copy_preprocessing
from esmm_torchrec.data.hashing import HashedIds
from esmm_torchrec.data.sources.feature_columns import CONSTANT
from esmm_torchrec.data.vocabulary import Vocabulary
from esmm_torchrec.durable import publish
from esmm_torchrec.errors import OptionError, RunError
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.serving.inputs import InputEncoder
from esmm_torchrec.serving.model_card import model_card
from esmm_torchrec.serving.package import (
    EXAMPLE,
    MODEL_CARD,
    PREPROCESSING,
    PROGRAM,
    Package,
    PackageForm,
    machine,
)
from esmm_torchrec.serving.predictor import Predictor
from esmm_torchrec.serving.program import Program
from esmm_torchrec.serving.signature import IMPRESSIONS, Signature
from esmm_torchrec.serving.trained_program import trained_program
from esmm_torchrec.serving.triton import write_repository

ExportForm = Literal["export", "aoti", "triton"]

EXAMPLE_IMPRESSIONS = 4
TRITON = "triton"

_TIME = "2026-01-31 09:30"


def export(
    run: RunFolder | Path | str,
    out: Path | str,
    *,
    form: ExportForm = "export",
    step: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    calibrated: bool = False,
) -> Package:
    """Exports the model of a run as a package.

    Only the towers and one table at a time are in memory: tables are kept in files while they are
    gathered and written.

    Args:
        run: the run folder.
        out: the folder to create; it appears once it is complete and its program reproduces the
            scores of the example.
        form: "export": a program for `torch.export.load`, on any machine. "aoti": a program
            compiled for machines like this one. "triton": the same, with a model repository for
            NVIDIA Triton in the folder `TRITON`.
        step: step of the checkpoint; None: that of the model.
        device: device on which the program runs.
        calibrated: whether the program applies the calibration that 'calibrate' fitted.

    Raises:
        RunError: `out` exists, `run` is not a run folder, or it lacks the checkpoint, a calibration
            of it, or the preprocessing of raw rows.
        OptionError: the device is not available.
    """
    out = Path(out)
    if out.exists():
        raise RunError(f"{out} already exists; remove it or choose another folder")
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError("`device` is cuda and there is no GPU")
    run = run if isinstance(run, RunFolder) else RunFolder.open(Path(run))
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tables = out.with_name(f"{out.name}.partial-tables")
    shutil.rmtree(tables, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        tables.mkdir()
        trained = trained_program(
            run, step=step, device=device, tables=tables, calibrated=calibrated
        )
        copy_preprocessing(run.preprocessing, partial / PREPROCESSING)
        rows = RowEncoder.load(partial / PREPROCESSING)
        encoder = InputEncoder(rows)
        request = example_request(rows)
        tensors = encoder.encode(request).tensors(encoder.signature, torch.device(device))
        with torch.inference_mode():
            scores = trained.program.outputs(*tensors)
        example = {
            "request": request,
            "scores": {name: score.tolist() for name, score in scores.items()},
        }
        (partial / EXAMPLE).write_text(json.dumps(example, indent=2) + "\n")
        program_form: PackageForm = "export" if form == "export" else "aoti"
        _write_program(partial / PROGRAM, trained.program, tensors, encoder.signature, program_form)
        calibration = run.calibration(trained.step).kind if calibrated else None
        program = trained.program.cpu()
        card = model_card(run, trained.step, encoder.signature, program, calibration)
        (partial / MODEL_CARD).write_text(card)
        package = Package(
            path=partial,
            form=program_form,
            device=device,
            method=run.model_options.method,
            step=trained.step,
            torch=torch.__version__,
            machine=machine(device) if program_form == "aoti" else "any",
            signature=replace(encoder.signature, outputs=tuple(scores)),
            tasks=run.schema.tasks,
            calibration=calibration,
            fingerprint="",
        )
        if form == "triton":
            write_repository(package, partial / TRITON)
        package.write()
        Predictor(partial)
        publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(tables, ignore_errors=True)
    return Package.open(out)


def example_request(encoder: RowEncoder) -> dict[str, Any]:
    """Builds a request of `EXAMPLE_IMPRESSIONS` impressions with the first ids of each vocabulary;
    the last impression has no values.

    Args:
        encoder: encoder of the training data.
    """
    request: dict[str, Any] = {}
    features = encoder.features
    for feature in features.id_features:
        if feature.name == CONSTANT:
            continue
        column = features.column_of(feature.name)
        if feature.name in features.time_parts:
            request[column] = [_TIME] * (EXAMPLE_IMPRESSIONS - 1) + [None]
            continue
        ids = _some_ids(encoder.vocabularies[feature.table])
        given = [ids[: place + 1] for place in range(EXAMPLE_IMPRESSIONS - 1)]
        if feature.name in features.texts:
            request[column] = [" ".join(map(str, bag)) for bag in given] + [None]
            continue
        request[column] = [
            *(bag if feature.multi_valued else (bag[-1] if bag else None) for bag in given),
            [] if feature.multi_valued else None,
        ]
        if feature.weighted:
            request[features.weights[feature.name]] = [
                [round(1.5 - 0.5 * place, 1) for place in range(len(ids))]
                if isinstance(ids, list)
                else (None if ids is None else 0.5)
                for ids in request[column]
            ]
    for name in features.dense:
        transform = encoder.dense[name]
        low = transform.low if transform.low is not None else transform.mean
        high = transform.high if transform.high is not None else transform.mean + transform.std
        if transform.knots:
            low, high = transform.knots[0], transform.knots[-1]
        steps = np.linspace(low, high, EXAMPLE_IMPRESSIONS - 1)
        request[features.column_of(name)] = [*(float(f"{one:.6g}") for one in steps), None]
    return request


def _some_ids(vocabulary: Vocabulary | HashedIds) -> list[Any]:
    if isinstance(vocabulary, Vocabulary):
        return vocabulary.raw_ids[: EXAMPLE_IMPRESSIONS - 1].to_pylist()
    ids = range(1, EXAMPLE_IMPRESSIONS)
    return list(ids) if vocabulary.kind == "integer" else list(map(str, ids))


def _write_program(
    path: Path,
    program: Program,
    tensors: list[torch.Tensor],
    signature: Signature,
    form: PackageForm,
) -> None:
    rows = torch.export.Dim(IMPRESSIONS, min=1)
    named = {IMPRESSIONS: rows}
    shapes = []
    for number, one in enumerate(signature.inputs):
        size = str(one.dims[0])
        if size not in named:
            named[size] = torch.export.Dim(f"ids_{number}", min=0)
        shapes.append({0: named[size]})
    with warnings.catch_warnings(action="ignore"):  # torch warns its own developers
        exported = torch.export.export(
            program, tuple(tensors), dynamic_shapes=(tuple(shapes),), strict=False
        )
        if form == "aoti":
            torch._inductor.aoti_compile_and_package(
                exported,
                package_path=str(path),
                # OpenMP regions cost more than they save; some would be entered once per row.
                inductor_configs={"cpp.threads": 1},
            )
            return
        with path.open("wb") as file:
            whole = _Whole(file)
            torch.export.save(exported, whole)  # pyright: ignore[reportArgumentType]
            whole.check()


class _Whole(io.RawIOBase):
    """File for torch.export.save, which ends the process if a write fails. So the error is kept
    until it returns."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Writes the data, unless an earlier write has failed."""
        size = memoryview(data).nbytes
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        return size

    def writable(self) -> bool:
        """Whether the file is writable; torch checks it."""
        return True

    def seekable(self) -> bool:
        """Whether the file is seekable, which torch requires of a buffer."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:  # noqa: ARG002
        """Ignores the seek to the start after the last write, which a file does not need."""
        return offset

    def check(self) -> None:
        """Raises the error of the first write that failed."""
        if self._error is None:
            self._file.flush()
        else:
            raise self._error
