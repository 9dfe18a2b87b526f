"""An exported model: a folder that scores raw rows in a process without TorchRec.

    OUT/
        package.json      inputs and outputs of the program, versions, a checksum of each file
        model.pt2         the program: for torch.export.load, or compiled by AOTInductor
        preprocessing/    dataset.json and the vocabularies, which encode raw values as inputs
        example.json      a request and its scores, which are checked when the package is loaded
        MODEL_CARD.md     human-readable description

`export` writes a package; `Predictor` opens one.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch

from esmm_torchrec.choices import check_choices
from esmm_torchrec.data.storage import Location
from esmm_torchrec.errors import RunError
from esmm_torchrec.serving.signature import Signature
from esmm_torchrec.tasks import TaskChain

FORMAT_VERSION = 3
"""Version of the format; since 3, a package states whether its scores are calibrated."""

DESCRIPTION = "package.json"
PROGRAM = "model.pt2"
PREPROCESSING = "preprocessing"
EXAMPLE = "example.json"
MODEL_CARD = "MODEL_CARD.md"

PackageForm = Literal["export", "aoti"]

EXAMPLE_TOLERANCE = 1e-5
"""Maximum absolute difference between the scores of the example at load and at export, which may be
on different processors."""

Run = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
"""Function from the input tensors, in order, to the output tensors."""


@dataclass(frozen=True)
class Package:
    """The description of an exported model, package.json without the checksums."""

    path: Path
    form: PackageForm
    device: Literal["cpu", "cuda"]
    method: str
    step: int
    torch: str
    """Version of torch that exported it."""
    machine: str
    """Target of an aoti program, such as "x86_64 AVX512" or the name of a GPU; otherwise "any"."""
    signature: Signature
    tasks: TaskChain
    calibration: str | None
    """Kind of the calibration in the program; None if it has none."""
    fingerprint: str
    """sha256 of package.json, which contains every checksum, so it identifies the whole package."""

    def __post_init__(self) -> None:
        check_choices(self)

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether a folder contains the description of a package."""
        return (path / DESCRIPTION).exists()

    @classmethod
    def open(cls, path: Path | str) -> Package:
        """Reads the description and compares every file with its checksum.

        Raises:
            RunError: the folder is not a package, has another version, or contains a changed file.
        """
        path = Path(path)
        try:
            content = (path / DESCRIPTION).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(
                f"{path} is not an exported model: it has no {DESCRIPTION}; give the OUT of "
                "'esmm-torchrec export'"
            ) from None
        try:
            values = json.loads(content)
            version = values["format_version"]
            if version != FORMAT_VERSION:
                raise RunError(
                    f"{path} is an exported model of format version {version}, but this library "
                    f"reads version {FORMAT_VERSION}; export it again"
                )
            package = cls(
                path=path,
                **{name: values[name] for name in _PLAIN},
                signature=msgspec.convert(values["signature"], Signature),
                tasks=TaskChain.from_list(values["tasks"]),
                fingerprint=Location.of(path / DESCRIPTION).sha256(),
            )
            checksums = dict(values["checksums"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path / DESCRIPTION} is broken ({error}); export again") from None
        for name in (PROGRAM, EXAMPLE):
            if name not in checksums:
                raise RunError(f"{path / DESCRIPTION} has no checksum of {name}; export again")
        for name, checksum in checksums.items():
            _check(path / name, checksum)
        return package

    def write(self) -> None:
        """Writes package.json next to the other files, with their checksums."""
        files = sorted(file for file in self.path.rglob("*") if file.is_file())
        values = {
            "format_version": FORMAT_VERSION,
            **{name: getattr(self, name) for name in _PLAIN},
            "signature": asdict(self.signature),
            "tasks": self.tasks.to_list(),
            "checksums": {
                str(one.relative_to(self.path)): Location.of(one).sha256() for one in files
            },
        }
        (self.path / DESCRIPTION).write_text(json.dumps(values, indent=2) + "\n")

    def load(self, *, runners: int = 1) -> Run:
        """Loads the program.

        Args:
            runners: number of threads that can run a compiled program at the same time.

        Raises:
            RunError: the program is broken, or for another machine or another version of torch.
        """
        if self.form == "aoti":
            here = machine(self.device)
            if self.torch != torch.__version__:
                raise RunError(
                    f"{self.path} was compiled with torch {self.torch}, but this is torch "
                    f"{torch.__version__}; export it again with this one"
                )
            if self.machine != here:
                raise RunError(
                    f"{self.path} was compiled for {self.machine}, but this machine has {here}; "
                    "export it again on such a machine, or with `format` export"
                )
        try:
            if self.form == "aoti":
                # torch.inductor's load_package compiles a processor test on each load, and what it
                # returns parses descriptions of the inputs on each call.
                loader = torch._C._aoti.AOTIModelPackageLoader(  # pyright: ignore
                    str(self.path / PROGRAM), "model", False, runners, -1
                )
                return loader.boxed_run
            module = torch.export.load(self.path / PROGRAM).module().to(self.device)
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise RunError(f"{self.path / PROGRAM} cannot be loaded ({reason})") from error
        return lambda tensors: module(*tensors)

    def example(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Reads the example: a request, and its scores at export time, float32 by column."""
        content = json.loads((self.path / EXAMPLE).read_text())
        scores = {name: np.array(one, np.float32) for name, one in content["scores"].items()}
        return content["request"], scores

    def check_example(self, predict: Callable[[Mapping[str, Any]], dict[str, np.ndarray]]) -> None:
        """Checks that the example still has the scores that it had at export time.

        Raises:
            RunError: the scores differ.
        """
        request, expected = self.example()
        found = predict(request)
        for name, scores in expected.items():
            if not np.allclose(found[name], scores, rtol=0, atol=EXAMPLE_TOLERANCE):
                difference = float(np.abs(found[name] - scores).max())
                raise RunError(
                    f"{self.path} scores its example differently from when it was exported ({name} "
                    f"differs by {difference:.2g}); export it again on this machine"
                )


_PLAIN = ("form", "device", "method", "step", "torch", "machine", "calibration")


def machine(device: str) -> str:
    """Describes the hardware that a compiled program depends on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _check(path: Path, checksum: str) -> None:
    try:
        found = Location.of(path).sha256()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise RunError(f"{path} cannot be read ({reason}); export again") from None
    if found != checksum:
        raise RunError(
            f"{path} was changed after it was exported (its checksum differs); restore it from a "
            "copy or export again"
        )
