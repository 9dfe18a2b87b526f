"""What the pictures of a run say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from esmm_torchrec.training import plots
from esmm_torchrec.training.plots import epoch_borders, plot_history


def _history(folder: Path, *, epochs: int, steps_per_epoch: int = 100, every: int = 20) -> Path:
    """As training writes it: a line's epoch is that of the step to come."""
    lines = [
        {
            "step": step,
            "epoch": step // steps_per_epoch,
            "loss": 0.4 - 0.001 * step,
            "ctr_auc": 0.6 + 0.0005 * step,
            "cvr_auc": 0.55 + 0.001 * step,
        }
        for step in range(every, epochs * steps_per_epoch + 1, every)
    ]
    path = folder / "history.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(("epochs", "borders"), [(1, []), (2, [100.0]), (3, [100.0, 200.0])])
def test_impressions_seen_before_are_called_so(
    epochs: int, borders: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    save = plots._save
    monkeypatch.setattr(
        plots, "_save", lambda figure, out: (drawn.append(figure), save(figure, out))
    )
    plot_history(_history(tmp_path, epochs=epochs), tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")
    loss, auc = drawn[0].axes
    assert ("before they are trained on" in auc.get_title()) == (epochs == 1)
    legend = auc.get_legend()
    assert legend is not None
    named = [text.get_text() for text in legend.get_texts()]
    assert named[:2] == ["click", "conversion if click"]
    assert named[2:] == (["from here on seen before"] if epochs > 1 else [])
    for axes in (loss, auc):
        dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
        found = [float(line.get_xdata()[0]) for line in dashed]  # pyright: ignore
        assert found == pytest.approx(borders, abs=10)


def test_a_border_lies_between_the_lines_around_it() -> None:
    lines = [{"step": step, "epoch": step // 50} for step in range(20, 101, 20)]
    assert epoch_borders(lines) == [50.0]
    assert epoch_borders(lines[:1]) == []
    assert epoch_borders([]) == []
