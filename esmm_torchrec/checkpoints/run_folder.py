"""The folder of one run.

config.json        options, data, tables, versions: everything that was resolved; below "resumed",
                   for each time that training went on, the step, ranks, device and placement
history.jsonl      one line now and then while training
metrics.json       what the trained model measures on the test half
preprocessing/     the data set's description and vocabularies, to score new rows
pctr.npy           what a method that needs other networks' pCTR of the clicks chose its rows by
plan.json          where each table was
checkpoints/       see `checkpoint`
tensorboard/  plots/
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esmm_torchrec.checkpoints.checkpoint import find_checkpoint, remove_later
from esmm_torchrec.errors import DataError, RunError
from esmm_torchrec.models.methods import ModelOptions
from esmm_torchrec.schema import Schema

_CONFIG = "config.json"
_METRICS = "metrics.json"
_DESCRIPTION = "dataset.json"
"""Of a prepared data set."""


@dataclass(frozen=True)
class RunFolder:
    """Paths and config of a run."""

    path: Path
    config: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """Opens the folder of a run.

        Raises:
            RunError: it is no run folder.
        """
        path = Path(path)
        try:
            config = json.loads((path / _CONFIG).read_text())
            run = cls(path, config)
            for key in ("identity", "mean_values_per_bag"):
                _ = config[key].items()
            _ = run.schema, run.model_options, config["options"]["history_weights"]
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(
                f"{path} is no run folder, it has no {_CONFIG}; give the --out of a training run"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, DataError) as error:
            raise RunError(f"{path / _CONFIG} is broken ({error}); train again") from None
        return run

    @classmethod
    def find(cls, path: Path | str, config: Mapping[str, Any], *, resume: str) -> RunFolder | None:
        """The run to go on with in a folder, or None where one may begin.

        Args:
            path: the folder, which need not be there.
            config: of this run; its "identity" says what makes two runs the same.
            resume: "never" takes an empty folder only, "auto" also a run of the same identity,
                a number only one with a checkpoint of that step.

        Raises:
            RunError: the folder holds something else.
        """
        path = Path(path)
        if (path / _CONFIG).exists():
            if resume == "never":
                raise RunError(
                    f"{path} holds a run already and --resume is never; choose another --out"
                )
            found = cls.open(path)
            found._check_identity(config["identity"])
            if resume.isdigit():
                find_checkpoint(found.checkpoints, int(resume))
            return found
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file; choose another --out")
        interrupted = _partial(path / _CONFIG)
        if path.exists() and any(file != interrupted for file in path.iterdir()):
            raise RunError(f"{path} is not empty and holds no run; choose another --out")
        if resume.isdigit():
            raise RunError(f"{path} holds no run to go on with; leave out --resume {resume}")
        return None

    @classmethod
    def start(cls, path: Path | str, config: Mapping[str, Any], *, resume: str) -> RunFolder:
        """Makes the folder of a run, or takes up the one that is there; see `find`."""
        path = Path(path)
        run = cls.find(path, config, resume=resume)
        if run is None:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, config)
            run.write_json(_CONFIG, config)
        return run

    def _check_identity(self, identity: Mapping[str, Any]) -> None:
        for key, value in json.loads(json.dumps(identity)).items():
            there = self.config["identity"].get(key)
            if there == value:
                continue
            option = f"--{key.replace('_', '-')}"
            what = f"{option} {_said(there)} and this one has {_said(value)}"
            if key == "data":
                what = f"another data set than this {option}"
            raise RunError(
                f"{self.path} holds a run with {what}; choose another --out, or the same options "
                "to go on with it"
            )

    @property
    def schema(self) -> Schema:
        """Of the data the run was trained on."""
        return Schema.from_dict(self.config["schema"])

    @property
    def model_options(self) -> ModelOptions:
        """Shape of the run's model."""
        return ModelOptions.from_dict(self.config["model"])

    def check_schema(self, schema: Schema, data: Path | str) -> None:
        """Makes sure that ids and dense values of a data set mean what they meant in training:
        the features, the vocabularies and what dense columns were standardised with are the same.

        Args:
            schema: of the data set.
            data: its folder.

        Raises:
            RunError: they do not, or the run's own description of its data is broken.
        """
        if schema != self.schema:
            raise self._other_data(data, "has other features or vocabularies than")
        own, other = _encoding(self.preprocessing), _encoding(Path(data))
        if other["vocabularies"] != own["vocabularies"]:
            raise self._other_data(data, "gives ids other rows of their tables than")
        if other["dense"] != own["dense"]:
            raise self._other_data(data, "standardised its dense features otherwise than")

    def _other_data(self, data: Path | str, differs: str) -> RunError:
        return RunError(
            f"{data} {differs} the data of {self.path}; give the data set that the run was "
            "trained on, or the raw rows to 'score --input'"
        )

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def history(self) -> Path:
        """File of what was measured while training."""
        return self.path / "history.jsonl"

    @property
    def preprocessing(self) -> Path:
        """Folder with what encodes new rows."""
        return self.path / "preprocessing"

    @property
    def pctr(self) -> Path:
        """File of the pCTR that a method chose its rows by; only such methods have it."""
        return self.path / "pctr.npy"

    def go_on_from(self, step: int, placement: Mapping[str, Any]) -> RunFolder:
        """Forgets everything behind a step, which is done again, and notes how; on rank 0, and
        only once the checkpoint of that step has been loaded.

        Args:
            step: that training goes on from.
            placement: what is noted in config.json: "ranks", "device" and the like.

        Returns:
            the same folder with the new config.
        """
        remove_later(self.checkpoints, step)
        self.drop_history(step)
        (self.path / _METRICS).unlink(missing_ok=True)
        resumed = [*self.config.get("resumed", ()), {"step": step} | dict(placement)]
        run = RunFolder(self.path, dict(self.config) | {"resumed": resumed})
        run.write_json(_CONFIG, run.config)
        return run

    def write_pctr(self, pctr: NDArray[np.floating]) -> None:
        """Keeps the pCTR of the clicked impressions, float64 (clicks,), whole or not at all."""
        with _partial(self.pctr).open("wb") as file:
            np.save(file, pctr)
        _partial(self.pctr).rename(self.pctr)

    def read_pctr(self, clicks: int) -> NDArray[np.floating] | None:
        """What `write_pctr` kept; None where it never did.

        Args:
            clicks: clicked impressions to train on.

        Raises:
            RunError: the file is broken.
        """
        try:
            pctr = np.load(self.pctr)
            if pctr.shape != (clicks,):
                raise ValueError(f"{pctr.shape} values for {clicks} clicks")
        except FileNotFoundError:
            return None
        except (ValueError, EOFError, AttributeError) as error:
            raise RunError(f"{self.pctr} is broken ({error}); train again") from None
        return pctr

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Writes one of the folder's JSON files, whole or not at all."""
        self._write(self.path / name, json.dumps(values, indent=2) + "\n")

    def drop_history(self, after: int) -> None:
        """Forgets what was noted of steps beyond `after`, and a line that an interrupted run did
        not end."""
        if not self.history.exists():
            return
        kept = []
        for line in self.history.read_text().splitlines(keepends=True):
            if not line.endswith("\n") or json.loads(line)["step"] > after:
                break
            kept.append(line)
        self._write(self.history, "".join(kept))

    @staticmethod
    def _write(path: Path, text: str) -> None:
        _partial(path).write_text(text)
        _partial(path).rename(path)


def _encoding(folder: Path) -> dict[str, Any]:
    """What turned raw values into those of a prepared data set."""
    try:
        description = json.loads((folder / _DESCRIPTION).read_text())
        checksums = description["checksums"].items()
        return {
            "vocabularies": {k: v for k, v in checksums if k.startswith("vocabulary/")},
            "dense": description["statistics"]["dense"],
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder / _DESCRIPTION} is broken ({error}); make it again") from None


def _said(value: Any) -> str:
    """A value of an option as it is given."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")
