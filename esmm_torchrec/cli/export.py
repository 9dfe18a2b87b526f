"""`esmm-torchrec export`: a trained model for a process that has torch alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from esmm_torchrec.serving.chosen_checkpoint import described
from esmm_torchrec.serving.export import export


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a model as a program of torch, with what turns raw values into its inputs.

    OUT gets model.pt2 for torch.export.load, inputs.json and README.txt on what it takes and
    gives, and preprocessing/ with the vocabularies. Neither this library nor TorchRec is needed to
    run it.
    """

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """The run folder."""
    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
    """The folder to make."""
    step: int | None = None
    """Of the checkpoint; if not given, the best one that validation chose, else the last."""


def run(options: Options) -> None:
    """Exports, then says what is where."""
    predictor = export(options.run, options.out, step=options.step)
    print(described(predictor.run, predictor.step))
    print(f"exported: {options.out} (model.pt2, inputs.json, README.txt, preprocessing/)")
