"""A world drawn straight into mapped splits against its raw files, prepared and mapped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from esmm_torchrec.comparison.worlds import World, draw_mapped, generate
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.sources.ali_ccp.prepare import prepare_ali_ccp

WORLD = World(impressions=60_000, seed=3, ctr=0.1, cvr=0.2)


@pytest.mark.parametrize("min_count", [1, 5])
def test_a_drawn_world_is_the_prepared_one(tmp_path: Path, min_count: int) -> None:
    generate(WORLD, tmp_path / "raw")
    prepared = prepare_ali_ccp(tmp_path / "raw", tmp_path / "prepared", min_count=min_count)
    drawn = draw_mapped(WORLD, tmp_path / "drawn", min_count=min_count)
    assert drawn.schema == prepared.schema
    for name in ("train", "test"):
        split, expected = drawn.open(name), MappedSplit.open(prepared, name)
        assert set(split.scalars) == set(expected.scalars)
        for column, values in expected.scalars.items():
            np.testing.assert_array_equal(split.scalars[column], values, column)
        assert set(split.bags) == set(expected.bags)
        for collection, stores in expected.bags.items():
            for mine, other in zip(split.bags[collection], stores, strict=True):
                assert (mine.features, mine.shared) == (other.features, other.shared)
                for array in ("offsets", "lengths", "values", "weights"):
                    values = getattr(other, array)
                    if values is None:
                        assert getattr(mine, array) is None
                    else:
                        np.testing.assert_array_equal(getattr(mine, array), values, array)
    left = {path.name for path in (tmp_path / "drawn").iterdir()}
    assert left == {"train", "test"}, "no scratch files are left"
