"""Draws a world directly into mapped splits, without raw text or Parquet.

The arrays equal those obtained by preparing and mapping the raw files of the world. Training
impressions wait in scratch files until their ids are counted and the vocabularies known; shared
rows stay in memory until all impressions of their split are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from esmm_torchrec.comparison.worlds.ali_ccp_text import weight_text
from esmm_torchrec.comparison.worlds.catalogue import Ints, Split
from esmm_torchrec.comparison.worlds.exposure import MAX_TIMES
from esmm_torchrec.comparison.worlds.fields import (
    Values,
    impression_values,
    item_values,
    raw_ids,
    visit_values,
)
from esmm_torchrec.comparison.worlds.world import VISITS_PER_BLOCK, Simulation, World
from esmm_torchrec.data.in_order import in_order
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared_form import impression_columns, shared_columns
from esmm_torchrec.data.sources.ali_ccp.fields import FIELDS, USER
from esmm_torchrec.data.sources.ali_ccp.waiting_rows import WaitingRows, encoded
from esmm_torchrec.data.split_writer import RowKind
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.schema import (
    CLICK,
    CONVERSION,
    GROUP_ID,
    SAMPLE_ID,
    SHARED_ROW,
    TRUE_CTR,
    TRUE_CVR,
    Schema,
    Table,
    weight_column,
)

_WEIGHTS = np.array([0.0, *(float(weight_text(n)) for n in range(1, MAX_TIMES + 1))], np.float32)
"""Weights by number of occurrences, equal to those parsed from the raw files."""

_COLUMNS = (GROUP_ID, TRUE_CTR, TRUE_CVR)

_SHARED_ROWS_PER_BLOCK = 8192


@dataclass(frozen=True)
class DrawnWorld:
    """A drawn world; `open` maps its splits."""

    folder: Path
    schema: Schema

    def open(self, split: Split) -> MappedSplit:
        """Maps a split."""
        return MappedSplit.map(self.folder / split, self.schema)


def draw_mapped(world: World, folder: Path, *, min_count: int) -> DrawnWorld:
    """Draws a world into mapped splits in a new folder.

    Args:
        world: settings of the world.
        folder: folder of the splits; it must not exist yet.
        min_count: minimum number of occurrences in the stored training rows for an id to have a
            separate row.
    """
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    simulation = Simulation(world)
    ids = raw_ids(simulation)
    with progress_bar(f"draw world {world.seed}", world.impressions, "impressions") as bar:
        waiting, train = WaitingRows(scratch), _Rows(simulation, "train", ids, bar.update)
        for table in train.impressions():
            waiting.add("impressions", table)
        for table in train.shared():
            waiting.add("shared", table)
        vocabularies = waiting.vocabularies(min_count)
        tables = [Table(name, of.num_embeddings) for name, of in vocabularies.items()]
        schema = Schema(tables=tuple(tables), id_features=FIELDS)
        names: dict[RowKind, list[str]] = {
            "impressions": impression_columns(schema, _COLUMNS).names,
            "shared": shared_columns(schema).names,
        }

        def batches(kind: RowKind, tables: Iterable[pa.Table]) -> Iterator[pa.RecordBatch]:
            for table in tables:
                rows = encoded(table, kind, vocabularies)
                yield from rows.select(names[kind]).to_batches()

        def lay_out(
            split: Split, impressions: Iterable[pa.Table], shared: Iterable[pa.Table]
        ) -> None:
            MappedSplit.write(
                folder / split,
                schema=schema,
                impressions=batches("impressions", impressions),
                shared=batches("shared", shared),
            )

        lay_out("train", waiting.take("impressions"), waiting.take("shared"))
        test = _Rows(simulation, "test", ids, bar.update)
        lay_out("test", test.impressions(), test.shared())
    scratch.rmdir()
    return DrawnWorld(folder, schema)


class _Rows:
    """Draws the rows of a split with raw ids."""

    def __init__(
        self,
        simulation: Simulation,
        split: Split,
        ids: Mapping[str, Ints],
        on_impressions: Callable[[int], object],
    ) -> None:
        self._simulation = simulation
        self._split: Split = split
        self._raw_ids = ids
        self._on_impressions = on_impressions
        num_visits = simulation.num_visits(split)
        self._index = simulation.visit_index(split, 0, num_visits)
        # Common rows are written in the order of their index.
        self._order = np.argsort(self._index)
        self._shared_row = np.empty(num_visits, np.int32)
        self._shared_row[self._order] = np.arange(num_visits, dtype=np.int32)
        self._visits: list[pa.Table] = []

    def impressions(self) -> Iterator[pa.Table]:
        """Yields the impressions, block by block."""
        stretches = self._simulation.stretches(self._split, VISITS_PER_BLOCK)
        for impressions, visits in in_order(self._block, stretches):
            self._visits.append(visits)
            self._on_impressions(len(impressions))
            yield impressions

    def shared(self) -> Iterator[pa.Table]:
        """Yields the shared rows; call it after all impressions are drawn."""
        rows = pa.concat_tables(self._visits).combine_chunks().take(pa.array(self._order))
        for first in range(0, len(rows), _SHARED_ROWS_PER_BLOCK):
            yield rows.slice(first, _SHARED_ROWS_PER_BLOCK)

    def _block(self, stretch: tuple[Split, int, int]) -> tuple[pa.Table, pa.Table]:
        """Returns the impressions and visits of a stretch."""
        block = self._simulation.block(*stretch)
        exposure, catalogue = block.exposure, self._simulation.catalogue
        visits = slice(exposure.first_visit, exposure.first_visit + len(exposure.user))
        # A row without a user forms a separate group, with the number that `prepare_ali_ccp` uses.
        alone = (self._index[visits] | np.uint64(1 << 63)).view(np.int64)
        group = np.where(exposure.user_logged, self._raw_ids[USER][exposure.user], alone)
        first, visit = exposure.first_impression + 1, exposure.visit
        impressions = {
            CLICK: block.click,
            CONVERSION: block.conversion,
            SAMPLE_ID: np.arange(first, first + len(visit)),
            SHARED_ROW: self._shared_row[visits][visit],
            GROUP_ID: group[visit],
            TRUE_CTR: block.true_ctr,
            TRUE_CVR: block.true_cvr,
        }
        of_items = self._columns(item_values(catalogue, exposure.item))
        of_others = self._columns(impression_values(catalogue, exposure))
        shared = self._columns(visit_values(exposure))
        return pa.table(impressions | of_items | of_others), pa.table(shared)

    def _columns(self, values: Mapping[str, Values]) -> dict[str, pa.Array]:
        """Returns raw ids and weights by column."""
        columns: dict[str, pa.Array] = {}
        for field, of in values.items():
            arrays: dict[str, np.ndarray] = {field: self._raw_ids[field][of.numbers]}
            if of.times is not None:
                arrays[weight_column(field)] = _WEIGHTS[of.times]
            for name, array in arrays.items():
                if of.offsets is None:
                    columns[name] = pa.array(array, mask=of.numbers < 0)
                else:
                    offsets = pa.array(of.offsets.astype(np.int32))
                    columns[name] = pa.ListArray.from_arrays(offsets, pa.array(array))
        return columns
