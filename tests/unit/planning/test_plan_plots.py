"""Pictures of a plan: what a reader can tell apart in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from esmm_torchrec.planning.estimates import estimate
from esmm_torchrec.planning.experiment import Experiment
from esmm_torchrec.planning.hardware import preset
from esmm_torchrec.planning.plan_plots import OTHERS_COLOUR, _ranks_plot
from esmm_torchrec.planning.scenario import Scenario
from esmm_torchrec.planning.table_list import read_tables

TABLES = """
tables:
  - {name: large, num_embeddings: 9000000, embedding_dim: 64, count: 12}
  - {name: busy, num_embeddings: 100000, embedding_dim: 64, pooling_factor: 50, count: 20}
  - {name: alone, num_embeddings: 20000000, embedding_dim: 64}
"""


def test_tables_of_one_count_are_one_part_of_a_bar_with_its_own_colour(tmp_path: Path) -> None:
    (tmp_path / "tables.yaml").write_text(TABLES)
    case = Scenario(read_tables(tmp_path / "tables.yaml"), preset("h100"), 1024)
    result = estimate(case, "table_wise", 4)
    figure = _ranks_plot(result, Experiment(case, (result,)))
    memory, time = figure.axes
    colours: dict[str, set[str]] = {}
    for axes, highest in ((memory, "large (12 tables)"), (time, "busy (20 tables)")):
        legend = axes.get_legend()
        assert legend is not None
        labels = [text.get_text() for text in legend.get_texts()]
        named = [label for label in labels if label != "towers"]
        assert sorted(named) == ["alone", "busy (20 tables)", "large (12 tables)"]
        # From the top of the stack down: what there is most of stands at its foot.
        assert named[-1] == highest
        for patch in axes.patches:
            colours.setdefault(str(patch.get_label()), set()).add(str(patch.get_facecolor()))
    assert all(len(colour) == 1 for colour in colours.values())
    assert len(set.union(*colours.values())) == len(colours)


def test_more_families_than_names_share_the_colour_of_others(tmp_path: Path) -> None:
    entries = "\n".join(
        f"  - {{name: t{n}, num_embeddings: {1000 * (n + 1)}, embedding_dim: 64, count: 2}}"
        for n in range(12)
    )
    (tmp_path / "tables.yaml").write_text(f"tables:\n{entries}\n")
    case = Scenario(read_tables(tmp_path / "tables.yaml"), preset("h100"), 1024)
    result = estimate(case, "row_wise", 2)
    figure = _ranks_plot(result, Experiment(case, (result,)))
    (others,) = [p for p in figure.axes[0].patches if "other tables" in str(p.get_label())]
    assert others.get_label() == "8 other tables"
    red = int(OTHERS_COLOUR[1:3], 16) / 255
    assert others.get_facecolor()[0] == pytest.approx(red)
