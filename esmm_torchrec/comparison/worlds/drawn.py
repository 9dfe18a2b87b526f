"""A world drawn straight into mapped splits, without raw text or Parquet on the way.

The result holds the same arrays as the raw files of the world prepared and mapped. Impressions wait
in scratch files, as numbers of the world, until the training split is counted and the vocabularies
are known; shared rows wait in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from esmm_torchrec.comparison.worlds.ali_ccp_text import weight_text
from esmm_torchrec.comparison.worlds.catalogue import SPLITS, Ints, Split, Streams
from esmm_torchrec.comparison.worlds.exposure import MAX_TIMES, Counts
from esmm_torchrec.comparison.worlds.files import ordered_map
from esmm_torchrec.comparison.worlds.raw_ids import RawIds
from esmm_torchrec.comparison.worlds.world import VISITS_PER_BLOCK, Block, Simulation, World
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared_form import impression_columns, shared_columns
from esmm_torchrec.data.sources.ali_ccp.fields import FIELDS, USER
from esmm_torchrec.data.vocabulary import IdCounter, Vocabulary
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.schema import (
    CLICK,
    CONVERSION,
    GROUP_ID,
    SAMPLE_ID,
    SHARED_ROW,
    TRUE_CTR,
    TRUE_CVR,
    IdFeature,
    Schema,
    Table,
    weight_column,
)

_WEIGHTS = np.array([0.0, *(float(weight_text(n)) for n in range(1, MAX_TIMES + 1))], np.float32)
"""Weight of a number of occurrences, as its text in the raw files is read."""

_COLUMNS = (GROUP_ID, TRUE_CTR, TRUE_CVR)

_SHARED_ROWS_PER_BLOCK = 8192


@dataclass(frozen=True)
class DrawnWorld:
    """What was drawn; its splits are mapped with `open`."""

    folder: Path
    schema: Schema

    def open(self, split: Split) -> MappedSplit:
        """Maps a split."""
        return MappedSplit.map(self.folder / split, self.schema)


def draw_mapped(world: World, folder: Path, *, min_count: int) -> DrawnWorld:
    """Draws a world into mapped splits below `folder`, which is made.

    Args:
        world: its settings.
        folder: of the splits; it must not exist.
        min_count: how often an id must occur in the stored training rows to have a row of its own.
    """
    folder.mkdir(parents=True)
    simulation = Simulation(world)
    ids = RawIds(simulation.catalogue, num_users=simulation.num_users, seed=world.seed)
    raw_ids = {feature.name: ids.of(feature.name) for feature in FIELDS}
    drawing = _Drawing(simulation, raw_ids, folder)
    schema, rows = None, {}
    with progress_bar(f"draw world {world.seed}", world.impressions, "impressions") as bar:
        for split in SPLITS:
            shared = drawing.draw(split, bar.update)
            if split == "train":
                vocabularies = {
                    feature.table: _vocabulary(
                        raw_ids[feature.name], drawing.counts[feature.name], min_count
                    )
                    for feature in FIELDS
                }
                rows = {
                    feature.name: vocabularies[feature.table].encode(raw_ids[feature.name])
                    for feature in FIELDS
                }
                schema = Schema(
                    tables=tuple(
                        Table(name, of.num_embeddings) for name, of in vocabularies.items()
                    ),
                    id_features=FIELDS,
                )
            assert schema is not None
            MappedSplit.write(
                folder / split,
                schema=schema,
                impressions=_encoded(
                    drawing.impressions(split), rows, impression_columns(schema, _COLUMNS)
                ),
                shared=_encoded(shared, rows, shared_columns(schema)),
            )
            drawing.scratch(split).unlink()
    assert schema is not None
    return DrawnWorld(folder, schema)


class _Rendered(NamedTuple):
    impressions: pa.RecordBatch
    """Columns of the impression files, with numbers of the world in place of rows."""
    shared: pa.RecordBatch


class _Drawing:
    """Draws splits as numbers of the world, and counts those of the training split."""

    def __init__(self, simulation: Simulation, raw_ids: Mapping[str, Ints], folder: Path) -> None:
        self._simulation = simulation
        self._raw_ids = raw_ids
        self._folder = folder
        self.counts = {name: np.zeros(len(ids), np.int64) for name, ids in raw_ids.items()}
        """Field → training impressions that have each of its numbers."""

    def scratch(self, split: Split) -> Path:
        """File of the impressions of a split."""
        return self._folder / f"{split}.arrow"

    def impressions(self, split: Split) -> Iterator[pa.RecordBatch]:
        """The impressions drawn before."""
        with pa.memory_map(str(self.scratch(split))) as file, pa.ipc.open_stream(file) as batches:
            yield from batches

    def draw(self, split: Split, on_impressions: Callable[[int], object]) -> list[pa.RecordBatch]:
        """Draws the impressions into the scratch file; gives the shared rows in their order."""
        simulation = self._simulation
        num_visits = simulation.num_visits(split)
        streams = Streams(simulation.world.seed)
        index = streams.generator("index", simulation.visits.place(split, 0))
        visit_index = index.bit_generator.random_raw(num_visits)
        # Common rows are written in the order of their index.
        order = np.argsort(visit_index)
        shared_row = np.empty(num_visits, np.int32)
        shared_row[order] = np.arange(num_visits, dtype=np.int32)

        def render(stretch: tuple[Split, int, int]) -> _Rendered:
            return self._render(simulation.block(*stretch), shared_row, visit_index)

        waiting: list[pa.RecordBatch] = []
        writer: pa.RecordBatchStreamWriter | None = None
        with pa.OSFile(str(self.scratch(split)), "wb") as file:
            for rendered in ordered_map(render, simulation.stretches(split, VISITS_PER_BLOCK)):
                if writer is None:
                    writer = pa.ipc.new_stream(file, rendered.impressions.schema)
                writer.write_batch(rendered.impressions)
                waiting.append(rendered.shared)
                if split == "train":
                    self._count(rendered)
                on_impressions(len(rendered.impressions))
            assert writer is not None
            writer.close()
        table = pa.Table.from_batches(waiting).combine_chunks().take(pa.array(order))
        return table.to_batches(max_chunksize=_SHARED_ROWS_PER_BLOCK)

    def _render(
        self, block: Block, shared_row: npt.NDArray[np.int32], visit_index: npt.NDArray[np.uint64]
    ) -> _Rendered:
        exposure, catalogue = block.exposure, self._simulation.catalogue
        visits = slice(exposure.first_visit, exposure.first_visit + len(exposure.user))
        item, visit = exposure.item, exposure.visit
        # A row without a user is a group of its own, as `prepare_ali_ccp` numbers it.
        alone = (visit_index[visits] | np.uint64(1 << 63)).view(np.int64)
        group = np.where(exposure.user_logged, self._raw_ids[USER][exposure.user], alone)
        first = exposure.first_impression + 1
        category, shop, brand = (
            of[item] for of in (catalogue.category, catalogue.shop, catalogue.brand)
        )
        lengths, nodes = catalogue.nodes.take(item)
        impressions = {
            CLICK: pa.array(block.click),
            CONVERSION: pa.array(block.conversion),
            SAMPLE_ID: pa.array(np.arange(first, first + len(item))),
            SHARED_ROW: pa.array(shared_row[visits][visit]),
            GROUP_ID: pa.array(group[visit]),
            TRUE_CTR: pa.array(block.true_ctr),
            TRUE_CVR: pa.array(block.true_cvr),
            **_single("205", item),
            **_single("206", category),
            **_single("207", shop),
            "210": _lists(np.concatenate([[0], np.cumsum(lengths)]), _number(nodes)),
            **_single("216", brand),
            **_single("508", category, exposure.category_times),
            **_single("509", shop, exposure.shop_times),
            **_single("702", brand, exposure.brand_times),
            **_counted("853", exposure.node_hits),
            **_single("301", exposure.position),
        }
        shared = _single(USER, np.where(exposure.user_logged, exposure.user, -1))
        for field, values in exposure.profile.items():
            shared |= _single(field, values)
        for field, history in (
            ("109_14", exposure.categories),
            ("110_14", exposure.shops),
            ("127_14", exposure.brands),
            ("150_14", exposure.nodes),
        ):
            shared |= _counted(field, history)
        return _Rendered(pa.record_batch(impressions), pa.record_batch(shared))

    def _count(self, rendered: _Rendered) -> None:
        for feature in FIELDS:
            numbers, counts = _occurrences(feature, rendered)
            known = self.counts[feature.name]
            known += np.bincount(numbers, counts, minlength=len(known)).astype(np.int64)


def _occurrences(feature: IdFeature, rendered: _Rendered) -> tuple[Ints, Ints | None]:
    """Numbers of a feature in a block, and in how many impressions each occurrence is; None: 1."""
    if not feature.shared:
        column = rendered.impressions.column(feature.name)
        numbers = column.flatten() if feature.multi_valued else column.drop_null()
        return numbers.to_numpy(), None
    column = rendered.shared.column(feature.name)
    rows = rendered.impressions.column(SHARED_ROW).to_numpy()
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    uses = np.diff(starts, append=len(rows))
    if feature.multi_valued:
        return column.flatten().to_numpy(), np.repeat(uses, column.value_lengths().to_numpy())
    there = column.is_valid().to_numpy(zero_copy_only=False)
    return column.drop_null().to_numpy(), uses[there]


def _vocabulary(raw_ids: Ints, counts: Ints, min_count: int) -> Vocabulary:
    counter = IdCounter()
    there = counts > 0
    counter.add(raw_ids[there], counts[there])
    return counter.vocabulary(min_count)


def _number(values: Ints) -> pa.Array:
    return pa.array(values.astype(np.int32))


def _single(field: str, values: Ints, times: Ints | None = None) -> dict[str, pa.Array]:
    """A column of single values, -1 being missing, with the weights of `times` if given."""
    missing = values < 0 if times is None else times == 0
    columns = {field: pa.array(values.astype(np.int32), mask=missing)}
    if times is not None:
        columns[weight_column(field)] = pa.array(_WEIGHTS[times], mask=missing)
    return columns


def _lists(offsets: Ints, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def _counted(field: str, counts: Counts) -> dict[str, pa.Array]:
    return {
        field: _lists(counts.offsets, _number(counts.values)),
        weight_column(field): _lists(counts.offsets, pa.array(_WEIGHTS[counts.times])),
    }


def _encoded(
    batches: Iterable[pa.RecordBatch], rows: Mapping[str, npt.NDArray[np.int32]], columns: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """The batches with rows of the tables in place of numbers of the world."""
    for batch in batches:
        arrays = []
        for name in columns.names:
            column = batch.column(name)
            if name in rows and pa.types.is_list(column.type):
                numbers = column.flatten().to_numpy()
                offsets = column.offsets.to_numpy()
                column = _lists(offsets - offsets[0], pa.array(rows[name][numbers]))
            elif name in rows:
                missing = column.is_null().to_numpy(zero_copy_only=False)
                numbers = column.fill_null(0).to_numpy()
                column = pa.array(rows[name][numbers], mask=missing)
            arrays.append(column)
        yield pa.RecordBatch.from_arrays(arrays, names=columns.names)
