"""`esmm-torchrec export`: packages a trained model for processes that have only torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from esmm_torchrec.data.storage import staged
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.serving.chosen_checkpoint import described
from esmm_torchrec.serving.export import ExportForm, export
from esmm_torchrec.serving.package import DESCRIPTION


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a model as a package that scores raw rows without TorchRec.

    OUT gets the program model.pt2; package.json, which describes its inputs and outputs;
    preprocessing/ with the vocabularies; an example; and a model card.
    """

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Run folder."""
    out: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OUT")]]
    """Folder to create, or its URI."""
    format: ExportForm = "export"
    """Form of the program. export: for torch.export.load, on any machine. aoti: compiled by
    AOTInductor for machines like this one, which needs a C++ compiler. triton: the same, with a
    model repository for NVIDIA Triton in OUT/triton."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device on which the program runs."""
    step: int | None = None
    """Step of the checkpoint to use; by default, the best one that validation chose, else the
    last."""
    calibrated: bool = False
    """Build the calibration fitted by 'calibrate' into the program."""


def run(options: Options) -> None:
    """Exports the model and prints where the package is."""
    folder = RunFolder.open(options.run)
    with staged(options.out, last=DESCRIPTION) as out:
        package = export(
            folder,
            out,
            form=options.format,
            step=options.step,
            device=options.device,
            calibrated=options.calibrated,
        )
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(described(folder, package.step))
    print(f"exported: {options.out} ({size / 1e6:,.1f} MB; MODEL_CARD.md describes it)")
