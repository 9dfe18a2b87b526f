"""Folder of a run.

config.json        options that identify the run ("identity"), its latest options, and "history":
                   for the start and each time it was resumed, the step, the options that may
                   change, the data and the ranks
history.jsonl      figures logged while training, a line every few steps
metrics.json       metrics of the trained model on the test split
preprocessing/     the data set's description and vocabularies, to score new rows
passes.json        result of the search for the number of passes, if there was one
pctr.npz           pCTR by which a method chose its clicked rows, if it needs one
plan.json          sharding plan
checkpoints/       see `checkpoints.files`
tensorboard/  plots/
.lock              exists while a training writes to the folder
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from esmm_torchrec.checkpoints.files import find_checkpoint, model_checkpoint, remove_later
from esmm_torchrec.durable import partial_file, replace_file
from esmm_torchrec.errors import DataError, RunError
from esmm_torchrec.metrics.calibration import Calibration
from esmm_torchrec.models.methods import ModelOptions
from esmm_torchrec.runs.lock import LOCK, RunLock
from esmm_torchrec.schema import Schema

FORMAT_VERSION = 2

_CONFIG = "config.json"
_METRICS = "metrics.json"
PASSES = "passes.json"
"""File with the result of the search for the number of passes."""

CALIBRATION = "calibration.json"
"""File that 'calibrate' writes to a run folder."""

_DESCRIPTION = "dataset.json"
"""File with the description of a prepared data set."""


@dataclass(frozen=True)
class RunFolder:
    """Paths and config of a run."""

    path: Path
    config: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """Opens the folder of a run.

        Raises:
            RunError: `path` is not a run folder, or this version cannot read it.
        """
        path = Path(path)
        try:
            config = json.loads((path / _CONFIG).read_text())
            run = cls(path, config)
            if config.get("format_version") != FORMAT_VERSION:
                raise RunError(
                    f"{path} was written by another version of this library, which this one cannot "
                    "read; train again, or use that version"
                )
            crc32 = config.pop("crc32", None)
            _ = config["identity"].items(), config["mean_values_per_bag"].items()
            _ = config["history"][-1]["data"]
            _ = run.schema, run.model_options, config["options"]["history_weights"]
            if crc32 != _crc32(config):
                raise ValueError("its content does not match its checksum")
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(
                f"{path} is not a run folder: it has no {_CONFIG}; give the `out` of a training run"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, DataError) as error:
            raise RunError(f"{path / _CONFIG} is broken ({error}); train again") from None
        return run

    @classmethod
    def find(cls, path: Path | str, config: Mapping[str, Any], *, resume: str) -> RunFolder | None:
        """Returns the run to resume in a folder, or None if a run may start there.

        Args:
            path: folder, which need not exist.
            config: config of this run, whose "identity" must match that of a run in the folder; the
                last entry of "history" names the data.
            resume: "never" accepts only an empty folder, "auto" also a run with the same identity,
                a number only a run with a checkpoint of that step.

        Raises:
            RunError: the folder contains something else.
        """
        path = Path(path)
        if (path / _CONFIG).exists():
            if resume == "never":
                raise RunError(
                    f"{path} holds a run already and `resume` is never; choose another `out`"
                )
            found = cls.open(path)
            found._check_identity(config)
            if resume.isdecimal():
                find_checkpoint(found.checkpoints, int(resume))
            return found
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file; choose another `out`")
        if not cls.may_be_at(path):
            raise RunError(f"{path} is not empty and does not hold a run; choose another `out`")
        if resume.isdecimal():
            raise RunError(f"{path} does not hold a run to resume; leave out `resume` {resume}")
        return None

    @classmethod
    def may_be_at(cls, path: Path) -> bool:
        """Returns whether a run exists at a path, or may start there."""
        if (path / _CONFIG).exists() or not path.exists():
            return True
        ours = {partial_file(path / _CONFIG), path / LOCK}
        return path.is_dir() and all(file in ours for file in path.iterdir())

    @classmethod
    def start(
        cls,
        path: Path | str,
        config: Mapping[str, Any],
        *,
        resume: str,
        lock: RunLock | None = None,
    ) -> RunFolder:
        """Creates the folder of a run, or opens an existing one; see `find`.

        Args:
            config: config of this run.
            resume: as in `find`.
            lock: lock of the folder, acquired before anything is written.

        Raises:
            RunError: as `find`, or another training holds the lock.
        """
        path = Path(path)
        if cls.find(path, config, resume=resume) is None:
            path.mkdir(parents=True, exist_ok=True)
        if lock is not None:
            lock.acquire()
        run = cls.find(path, config, resume=resume)
        if run is None or find_checkpoint(run.checkpoints) is None:
            run = cls(path, {"format_version": FORMAT_VERSION, **config})
            run._write_config()
        return run

    def _check_identity(self, config: Mapping[str, Any]) -> None:
        differs = self.difference(config["identity"])
        if differs:
            raise RunError(
                f"{self.path} holds a run with {differs}; choose another `out`, or give the same "
                "option to resume"
            )
        data = config["history"][-1]["data"]
        if self.preprocessing.exists() and not self.was_trained_on(data["fingerprint"]):
            differs = self._difference(Path(data["path"]))
            if differs:
                raise RunError(
                    f"{data['path']} {differs} the data of {self.path}; give data prepared with "
                    f"the same vocabularies, or start another run with `start_from` {self.path}"
                )

    def difference(self, identity: Mapping[str, Any]) -> str | None:
        """Returns the first option in which the run differs, as part of a sentence; None if there
        is none.

        Args:
            identity: identity of another run, or a part of it.
        """
        for key, here in json.loads(json.dumps(identity)).items():
            there = self.config["identity"].get(key, self.config["options"].get(key))
            if there != here:
                return "{} {} and this one has {}".format(*_differing_option(key, there, here))
        return None

    def was_trained_on(self, fingerprint: str) -> bool:
        """Returns whether the run was started or last resumed with the data set of a
        fingerprint."""
        return self.config["history"][-1]["data"]["fingerprint"] == fingerprint

    def has_other_data(self, fingerprint: str) -> bool:
        """Returns whether the run was ever trained on a data set with another fingerprint."""
        return any(entry["data"]["fingerprint"] != fingerprint for entry in self.config["history"])

    def data_of(self, step: int) -> str:
        """Returns the fingerprint of the data set that a step was trained on.

        Args:
            step: step of an existing checkpoint, from 1.
        """
        # A later entry overrides earlier ones, whose steps beyond its own were dropped.
        entries = [entry for entry in self.config["history"] if entry["step"] < step]
        return entries[-1]["data"]["fingerprint"]

    @property
    def schema(self) -> Schema:
        """Schema of the data that the run was trained on."""
        return Schema.from_dict(self.config["schema"])

    @property
    def model_options(self) -> ModelOptions:
        """Options that determine the shape of the run's model."""
        return ModelOptions.from_dict(self.config["model"])

    def check_data(self, data: Path | str, description: bytes | None = None) -> None:
        """Checks that ids and dense values of a data set have the same meaning as in training: the
        features, the vocabularies and the standardisation of dense columns are the same.

        Args:
            data: folder of the data set, or its name if it is in a store.
            description: content of its dataset.json; None: read from the folder.

        Raises:
            RunError: one of them differs, or the run's own description of its data is broken.
        """
        differs = self._difference(Path(data), description)
        if differs:
            raise RunError(
                f"{data} {differs} the data of {self.path}; give the data set that the run was "
                "trained on, or score its raw rows"
            )

    def _difference(self, data: Path, description: bytes | None = None) -> str | None:
        """Returns the difference between a data set and that of the run, as part of a sentence;
        None if ids and values have the same meaning."""
        own, other = _encoding(self.preprocessing), _encoding(data, description)
        if other["schema"] != own["schema"]:
            return "has other features or vocabularies than"
        if other["vocabularies"] != own["vocabularies"]:
            return "gives ids other rows of their tables than"
        if other["dense"] != own["dense"]:
            return "standardised its dense features differently from"
        return None

    @property
    def history_weights(self) -> Literal["normalised", "raw"]:
        """Treatment of the weights of multi-valued features."""
        return self.config["options"]["history_weights"]

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def model_checkpoint(self, step: int | None = None) -> Path:
        """Returns the checkpoint of a step; None: the best one if validation chose one, else the
        last one.

        Raises:
            RunError: it does not exist.
        """
        checkpoint = model_checkpoint(self.checkpoints, step)
        if checkpoint is None:
            raise RunError(f"{self.path} has no checkpoint yet; wait for its training to end")
        return checkpoint

    @property
    def history(self) -> Path:
        """File of the figures logged while training."""
        return self.path / "history.jsonl"

    @property
    def preprocessing(self) -> Path:
        """Folder of the description and vocabularies that encode new rows."""
        return self.path / "preprocessing"

    @property
    def pctr(self) -> Path:
        """File of the pCTR by which a method chose its rows; only such methods have it."""
        return self.path / "pctr.npz"

    def calibration(self, step: int) -> Calibration:
        """Returns the calibration that 'calibrate' fitted to the checkpoint of a step.

        Raises:
            RunError: it does not exist, is damaged or belongs to another step.
        """
        file = self.path / CALIBRATION
        try:
            values = json.loads(file.read_text())
            found, fitted_to = Calibration.from_dict(values), values["step"]
        except FileNotFoundError:
            raise RunError(
                f"{self.path} has no {CALIBRATION}; run 'esmm-torchrec calibrate' first"
            ) from None
        except (OSError, ValueError, KeyError, TypeError):
            raise RunError(f"{file} is damaged; run 'esmm-torchrec calibrate' again") from None
        if fitted_to != step:
            raise RunError(
                f"{file} is of step {fitted_to} and the model is of step {step}; run "
                "'esmm-torchrec calibrate' again"
            )
        return found

    def resume_from(self, step: int, config: Mapping[str, Any]) -> RunFolder:
        """Drops everything after a step and records how the run is resumed; to be called on rank 0,
        once the checkpoint of that step has been loaded.

        Args:
            step: step from which training continues.
            config: config of this run; the last entry of its "history" is added to the run's own.

        Returns:
            the same folder with the new config.
        """
        remove_later(self.checkpoints, step)
        self.drop_history(step)
        (self.path / _METRICS).unlink(missing_ok=True)
        history = [*self.config["history"], {**config["history"][-1], "step": step}]
        changed = {"format_version": FORMAT_VERSION, **config, "history": history}
        run = RunFolder(self.path, changed)
        run._write_config()
        return run

    def check_preprocessing(self) -> None:
        """Checks that the description of the data, which encodes raw rows, is one that the run was
        trained with.

        Raises:
            RunError: it is missing or was changed.
        """
        path = self.preprocessing / _DESCRIPTION
        try:
            fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise RunError(
                f"{path}, which encodes raw rows, cannot be read ({reason}); copy it from the data "
                "set that the run was trained on, or score a prepared data set"
            ) from None
        if fingerprint not in {entry["data"]["fingerprint"] for entry in self.config["history"]}:
            raise RunError(
                f"{path} was changed after it was written (its checksum differs); copy it from the "
                "data set that the run was trained on"
            )

    def write_pctr(self, pctr: NDArray[np.floating]) -> None:
        """Writes the pCTR of the clicked impressions, float64 (clicks,), atomically."""
        buffer = io.BytesIO()
        np.savez(buffer, pctr=pctr)  # with a checksum, unlike np.save
        replace_file(self.pctr, buffer.getbuffer())

    def read_pctr(self, clicks: int) -> NDArray[np.floating] | None:
        """Returns the pCTR written by `write_pctr`; None if there is none.

        Args:
            clicks: number of clicked impressions to train on.

        Raises:
            RunError: the file is broken.
        """
        try:
            with np.load(io.BytesIO(self.pctr.read_bytes())) as file:  # compares its checksum
                pctr = file["pctr"]
            if pctr.shape != (clicks,):
                raise ValueError(f"{pctr.shape} values for {clicks} clicks")
        except FileNotFoundError:
            return None
        except (ValueError, EOFError, KeyError, NotImplementedError, BadZipFile) as error:
            raise RunError(f"{self.pctr} is broken ({error}); train again") from None
        return pctr

    def _write_config(self) -> None:
        self.write_json(_CONFIG, {**self.config, "crc32": _crc32(self.config)})

    def read_passes(self) -> dict[str, Any] | None:
        """Returns the result of the search for the number of passes; None if there was none.

        Raises:
            RunError: the file is broken.
        """
        try:
            return json.loads((self.path / PASSES).read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise RunError(f"{self.path / PASSES} is broken ({error}); delete it") from None

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Writes one of the folder's JSON files atomically."""
        replace_file(self.path / name, (json.dumps(values, indent=2) + "\n").encode())

    def drop_history(self, after: int) -> None:
        """Deletes the lines of steps beyond `after` from the history, and a line that an
        interrupted run left incomplete."""
        if not self.history.exists():
            return
        kept = []
        for line in self.history.read_text().splitlines(keepends=True):
            if not line.endswith("\n") or self._step_of(line) > after:
                break
            kept.append(line)
        replace_file(self.history, "".join(kept).encode())

    def _step_of(self, line: str) -> int:
        try:
            return int(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError):
            raise RunError(
                f"{self.history} has a line without figures ({line[:60].strip()}); remove it"
            ) from None


def _encoding(folder: Path, description: bytes | None = None) -> dict[str, Any]:
    """Returns the parts of a data set's description that determine how raw values are encoded."""
    try:
        content = description or (folder / _DESCRIPTION).read_bytes()
        values = json.loads(content)
        return {
            # A data set with appended days has its vocabularies in the folder of a day.
            "vocabularies": {
                table: checksum
                for name, checksum in values["checksums"].items()
                for _, folder, table in [name.rpartition("vocabulary/")]
                if folder
            },
            "dense": values["statistics"]["dense"],
            "schema": values["schema"],
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder / _DESCRIPTION} is broken ({error}); create it again") from None


def _crc32(config: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(config).encode())


def _differing_option(name: str, there: Any, here: Any) -> tuple[str, str, str]:
    """Returns the option in which two values differ, and the values: `name` itself, or an option
    of a method's part."""
    option = f"`{name}`"
    if not isinstance(there, dict) or not isinstance(here, dict):
        return option, _said(there), _said(here)
    if there["name"] != here["name"]:
        return option, there["name"], here["name"]
    key = next(key for key in {**there, **here} if there.get(key) != here.get(key))
    return f"`{name}.{key}`", _said(there.get(key)), _said(here.get(key))


def _said(value: Any) -> str:
    """Formats the value of an option as on the command line."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
