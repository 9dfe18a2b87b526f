"""Writes a model repository for NVIDIA Triton from a compiled package; serving it runs no Python.

    OUT/NAME/config.pbtxt    inputs and outputs
    OUT/NAME/1/model.pt2     the program, for Triton's PyTorch backend (platform "torch_aoti")

Triton names inputs by position, INPUT__0 and so on; package.json lists them in this order. A batch
is one request, because Triton cannot concatenate the multi-valued features of several requests.
"""

from __future__ import annotations

import re
from pathlib import Path

from esmm_torchrec.serving.package import PROGRAM, Package
from esmm_torchrec.serving.signature import Input

NAME = "esmm"
"""Name of the model in Triton."""

_TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32", "float64": "TYPE_FP64"}


def write_repository(package: Package, out: Path) -> None:
    """Writes the repository.

    Args:
        package: a compiled package (`form` "aoti"); its program is hard-linked, not copied.
        out: folder to write to, on the same file system.
    """
    assert package.form == "aoti"
    version = out / NAME / "1"
    version.mkdir(parents=True)
    (version / PROGRAM).hardlink_to(package.path / PROGRAM)
    (out / NAME / "config.pbtxt").write_text(_config(package))


def _config(package: Package) -> str:
    """Returns the text of config.pbtxt, with the name of each input in a comment."""
    signature = package.signature
    inputs = [_tensor(f"INPUT__{place}", one) for place, one in enumerate(signature.inputs)]
    outputs = [
        _tensor(f"OUTPUT__{place}", Input(column, "float32", ("impressions",)))
        for place, column in enumerate(signature.outputs)
    ]
    kind = "KIND_GPU" if package.device == "cuda" else "KIND_CPU"
    lines = [
        f'name: "{NAME}"',
        'backend: "pytorch"',
        'platform: "torch_aoti"',
        f'default_model_filename: "{PROGRAM}"',
        "max_batch_size: 0",
        *(f"input {tensor}" for tensor in inputs),
        *(f"output {tensor}" for tensor in outputs),
        f"instance_group {{ kind: {kind} count: 1 }}",
    ]
    return "\n".join(lines) + "\n"


def _tensor(name: str, one: Input) -> str:
    dims = ", ".join(str(size) if isinstance(size, int) else "-1" for size in one.dims)
    comment = re.sub(r"\s+", " ", one.name)
    return f'{{ name: "{name}" data_type: {_TYPES[one.dtype]} dims: [ {dims} ] }}  # {comment}'
