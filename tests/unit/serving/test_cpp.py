"""The C++ program of docs/serving.md, compiled against the libtorch of this Python."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from esmm_torchrec.serving.predictor import Predictor

ROOT = Path(__file__).parents[3]
PROGRAM = ROOT / "examples" / "score.cpp"


def test_the_program_is_the_one_in_the_docs() -> None:
    (block,) = (ROOT / "docs" / "serving.md").read_text().split("```cpp\n")[1:]
    assert block.split("```")[0] == PROGRAM.read_text()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_it_scores_as_the_predictor_does(compiled: Path, tmp_path: Path) -> None:
    torch_folder, program = Path(torch.__path__[0]), tmp_path / "score"
    include, library = torch_folder / "include", torch_folder / "lib"
    options = ["-std=c++20", "-I", str(include), "-I", str(include / "torch/csrc/api/include")]
    libraries = ["-L", str(library), f"-Wl,-rpath,{library}", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = ["g++", *options, str(PROGRAM), "-o", str(program), *libraries]
    subprocess.run(command, check=True, timeout=500)
    predictor = Predictor(compiled)
    request = {"user": [3, 4], "tags": [[1], [2, 3]], "age": [30, None]}
    inputs = predictor.encode(request)
    tensors = inputs.tensors(predictor.encoder.signature, predictor.device)
    torch.save(tensors, tmp_path / "inputs.pt")
    given = [str(program), str(compiled / "model.pt2"), str(tmp_path / "inputs.pt")]
    printed = subprocess.run(given, check=True, capture_output=True, text=True, timeout=100).stdout
    expected = np.array(list(predictor.predict(request).values()))
    np.testing.assert_allclose(np.loadtxt(printed.splitlines()), expected, atol=1e-5)
