"""The folder of a synthetic world: the four raw Ali-CCP files, the truth and the settings.

Several threads draw and format blocks of visits, which are written in order, so memory grows only
with users and items. The common rows of a split are first collected in a scratch file,
because they are written in the order of their index, which is unrelated to that of impressions.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from esmm_torchrec.comparison.worlds.ali_ccp_text import AliCcpText, index_texts, text_bytes
from esmm_torchrec.comparison.worlds.catalogue import SPLITS, Split
from esmm_torchrec.comparison.worlds.world import VISITS_PER_BLOCK, Block, Simulation, World
from esmm_torchrec.data.in_order import in_order
from esmm_torchrec.errors import DataError
from esmm_torchrec.progress import progress_bar

TRUTH_FILE = "truth.parquet"
WORLD_FILE = "world.json"
TRUTH_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("true_ctr", pa.float32(), nullable=False),
        pa.field("true_cvr", pa.float32(), nullable=False),
        pa.field("conversion_if_clicked", pa.int8(), nullable=False),
    ]
)


@dataclass(frozen=True)
class GeneratedSplit:
    """Counts of a split, and the AUCs of its true probabilities."""

    impressions: int
    clicks: int
    conversions: int
    """Number of logged conversions; each follows a click."""
    conversions_if_all_clicked: int
    """Number of conversions if every impression had been clicked."""
    common_rows: int
    ctr_auc: float | None
    """AUC of true_ctr for clicks. Each AUC is None if all its labels are equal."""
    cvr_auc: float | None
    """AUC of true_cvr for conversions on the clicked impressions."""
    cvr_auc_entire_space: float | None
    """AUC of true_cvr on all impressions, with true_cvr itself as the (soft) label."""


@dataclass(frozen=True)
class GeneratedWorld:
    """Summary of a world that `generate` wrote."""

    world: World
    users: int
    items: int
    train: GeneratedSplit
    test: GeneratedSplit
    file_bytes: dict[str, int]
    """Name → bytes of the raw and truth files."""


def generate(
    world: World, out: str | os.PathLike[str], *, visits_per_block: int = VISITS_PER_BLOCK
) -> GeneratedWorld:
    """Writes a world and its truth as raw Ali-CCP files to the new folder `out`.

    The folder contains sample_skeleton_{train,test}.csv, common_features_{train,test}.csv,
    truth.parquet and world.json. It appears only when it is complete; until then the files are in
    `out` + ".partial", which a later call replaces.

    Args:
        world: settings of the world; equal settings produce equal bytes.
        out: folder to create.
        visits_per_block: number of visits that a thread draws at a time; affects only memory.

    Returns:
        counts of each split, and the AUCs of its true probabilities.

    Raises:
        DataError: `out` already exists.
    """
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} already exists; remove it or choose another folder")
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    generated = _write(world, partial, visits_per_block)
    partial.rename(out)
    return generated


class _Rendered(NamedTuple):
    block: Block
    skeleton: pa.Array
    common: pa.Array
    common_index: npt.NDArray[np.uint64]


def _write(world: World, folder: Path, visits_per_block: int) -> GeneratedWorld:
    simulation = Simulation(world)
    text = AliCcpText(simulation)

    def render(stretch: tuple[Split, int, int]) -> _Rendered:
        block, index = simulation.block(*stretch), simulation.visit_index(*stretch)
        texts = index_texts(index)
        return _Rendered(block, text.skeleton(block, texts), text.common(block, texts), index)

    splits: dict[Split, GeneratedSplit] = {}
    with (
        progress_bar("generate", world.impressions, "impressions") as bar,
        pq.ParquetWriter(folder / TRUTH_FILE, TRUTH_SCHEMA) as truth,
    ):
        for split in SPLITS:
            tally = _Tally()
            common = _CommonRows(folder / f"common_features_{split}.csv")
            with (folder / f"sample_skeleton_{split}.csv").open("wb") as skeleton, common:
                stretches = simulation.stretches(split, visits_per_block)
                for rendered in in_order(render, stretches):
                    skeleton.write(text_bytes(rendered.skeleton))
                    common.add(rendered.common, rendered.common_index)
                    truth.write_table(_truth(rendered.block))
                    tally.add(rendered.block)
                    bar.update(len(rendered.skeleton))
                common.finish()
            splits[split] = tally.result()
    generated = GeneratedWorld(
        world=world,
        users=simulation.visits.num_users,
        items=simulation.catalogue.num_items,
        **splits,
        file_bytes={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    )
    (folder / WORLD_FILE).write_text(json.dumps(asdict(generated), indent=2) + "\n")
    return generated


def _truth(block: Block) -> pa.Table:
    exposure, count = block.exposure, len(block.click)
    first = exposure.first_impression + 1
    columns: list[Any] = [
        np.arange(first, first + count),
        np.full(count, exposure.split),
        block.true_ctr,
        block.true_cvr,
        block.conversion_if_clicked,
    ]
    arrays = [pa.array(c, type=f.type) for c, f in zip(columns, TRUTH_SCHEMA, strict=True)]
    return pa.table(arrays, schema=TRUTH_SCHEMA)


class _CommonRows:
    """Collects common rows in any order and writes them in the order of their index."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unordered = path.with_suffix(".unordered")
        self._file = self._unordered.open("w+b")
        self._index: list[npt.NDArray[np.uint64]] = []
        self._lengths: list[npt.NDArray[np.int32]] = []

    def __enter__(self) -> _CommonRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, rows: pa.Array, index: npt.NDArray[np.uint64]) -> None:
        self._file.write(text_bytes(rows))
        self._index.append(index)
        self._lengths.append(np.diff(np.frombuffer(rows.buffers()[1], np.int32)[: len(rows) + 1]))

    def finish(self) -> None:
        order = np.argsort(np.concatenate(self._index))
        lengths = np.concatenate(self._lengths)
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        with self._path.open("wb") as ordered:
            for start, length in zip(starts[order].tolist(), lengths[order].tolist(), strict=True):
                self._file.seek(start)
                ordered.write(self._file.read(length))
        self._unordered.unlink()


class _Tally:
    """Computes the counts of a split and the AUCs of its truth."""

    def __init__(self) -> None:
        self._impressions = self._clicks = self._conversions = self._if_clicked = self._visits = 0
        self._ctr, self._cvr, self._entire = _Ranking(), _Ranking(), _Ranking()

    def add(self, block: Block) -> None:
        clicked = block.click == 1
        self._impressions += len(clicked)
        self._clicks += int(clicked.sum())
        self._conversions += int(block.conversion.sum())
        self._if_clicked += int(block.conversion_if_clicked.sum())
        self._visits += len(block.exposure.user)
        self._ctr.add(block.true_ctr, block.click)
        self._cvr.add(block.true_cvr[clicked], block.conversion[clicked])
        self._entire.add(block.true_cvr, block.true_cvr)

    def result(self) -> GeneratedSplit:
        return GeneratedSplit(
            impressions=self._impressions,
            clicks=self._clicks,
            conversions=self._conversions,
            conversions_if_all_clicked=self._if_clicked,
            common_rows=self._visits,
            ctr_auc=self._ctr.auc(),
            cvr_auc=self._cvr.auc(),
            cvr_auc_entire_space=self._entire.auc(),
        )


class _Ranking:
    """Computes the AUC of probabilities added in chunks, in bounded memory.

    Scores that agree in exponent and the first ten bits of the mantissa, so within 0.1 %, count as
    ties: the AUC is accurate to about 1e-6.
    """

    DROPPED_BITS = 13

    def __init__(self) -> None:
        # Positive floats and their bits, read as integers, have the same order.
        highest = int(np.float32(1.0).view(np.int32)) >> self.DROPPED_BITS
        self._positive = np.zeros(highest + 1)
        self._negative = np.zeros(highest + 1)

    def add(self, score: npt.NDArray[np.float32], label: npt.NDArray[Any]) -> None:
        """Adds scores. Labels may be soft: an impression is positive with its label as weight."""
        place = score.view(np.int32) >> self.DROPPED_BITS
        positive = np.bincount(place, weights=label, minlength=len(self._positive))
        self._positive += positive
        self._negative += np.bincount(place, minlength=len(self._positive)) - positive

    def auc(self) -> float | None:
        """Returns the AUC; None if all labels are equal."""
        pairs = self._positive.sum() * self._negative.sum()
        if not pairs:
            return None
        below = np.cumsum(self._negative) - self._negative / 2
        return float(self._positive @ below / pairs)
