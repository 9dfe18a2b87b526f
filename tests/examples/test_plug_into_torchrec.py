"""ESMM in a TorchRec pipeline: it learns, and goes on from a checkpoint on other ranks."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from examples.plug_into_torchrec import HISTORY, Options, main
from tests.ranks import torchrun

SCRIPT = Path(__file__).parents[2] / "examples" / "plug_into_torchrec.py"
ROWS = 512


def figures(printed: str) -> dict[int, dict[str, float]]:
    """Step → name → figure, from the lines the program prints."""
    lines = re.findall(r"^step (\d+)  (.+)$", printed, re.MULTILINE)
    return {
        int(step): {name: float(value) for name, value in map(str.split, re.split("  +", rest))}
        for step, rest in lines
    }


def best_aucs() -> dict[str, float]:
    """AUCs of the probabilities that the labels are drawn from, written down once more."""
    random = np.random.default_rng(0)
    item, user = random.integers(0, 5, 100_000), random.integers(0, 4, 100_000)
    dense = random.normal(size=100_000)
    length = random.integers(0, HISTORY + 1, 100_000)
    pctr = 1 / (1 + np.exp(2.5 - item - dense))
    pcvr = 1 / (1 + np.exp(2.5 - user - 0.5 * length))
    click = random.random(100_000) < pctr
    conversion = click & (random.random(100_000) < pcvr)
    return {
        "ctr_auc": float(roc_auc_score(click, pctr)),
        "cvr_auc": float(roc_auc_score(conversion[click], pcvr[click])),
        "ctcvr_auc": float(roc_auc_score(conversion, pctr * pcvr)),
    }


def test_it_learns_and_goes_on_from_a_checkpoint_on_two_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    torch.manual_seed(0)
    main(Options(steps=100, save=state))
    first = figures(capsys.readouterr().out)
    main(Options(steps=150, load=state))
    alone = figures(capsys.readouterr().out)
    assert (list(first), list(alone)) == ([50, 100], [150])
    assert first[50]["loss"] > first[100]["loss"] + 0.05
    for name, best in best_aucs().items():
        assert best - 0.03 < alone[150][name] < best + 0.02, name

    arguments = ["--steps", "150", "--load", state, "--batch-size", str(ROWS // 2)]
    process = torchrun(2, SCRIPT, *arguments)
    assert process.returncode == 0, process.stderr
    on_two = figures(process.stdout)
    assert list(on_two) == [150]
    for step in alone:
        assert on_two[step] == pytest.approx(alone[step], abs=2e-5)
