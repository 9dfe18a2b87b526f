"""Rejects ids that are not rows of their table before they reach a kernel.

fbgemm replaces such an id by 0, with one line on stderr, and trains row 0. A table sharded by rows
may silently use another row. This library's reader never produces such ids; other sources may.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec.errors import OptionError


class LookedUp(NamedTuple):
    """Table that a feature looks up."""

    table: str
    rows: int


_UNCHECKED = -1
"""Number of rows that marks a feature that is not looked up."""


def looked_up(configs: Iterable[EmbeddingBagConfig]) -> dict[str, LookedUp]:
    """Maps each feature to its table."""
    return {
        name: LookedUp(config.name, config.num_embeddings)
        for config in configs
        for name in config.feature_names
    }


def check_ids(features: KeyedJaggedTensor | None, tables: Mapping[str, LookedUp]) -> None:
    """Checks that every id of a batch is a row of its table.

    fbgemm's own check does not suffice: it accepts -1, and it runs after a table sharded by rows
    has distributed the ids to the ranks.

    On a GPU, the check does not synchronise: a wrong id ends the process with a device-side assert.

    Args:
        features: ids, int32 or int64. None is not checked, and nothing is while torch compiles.
        tables: feature → table; other features are not checked.

    Raises:
        OptionError: an id is out of range; the message names the feature.
    """
    if features is None or torch.compiler.is_compiling():
        return
    values = features.values()
    if values.is_meta or not values.numel():
        return
    rows = tuple(
        tables[name].rows if name in tables else _UNCHECKED
        for name in features.keys()  # noqa: SIM118
    )
    lengths = features.length_per_key()
    if values.device.type == "cpu":
        if not _in_range(values.numpy(), lengths, rows):
            raise _wrong_id(features, tables)
        return
    rows_of_ids = _tensor(rows, values.dtype, values.device).repeat_interleave(
        torch.tensor(lengths).to(values.device, non_blocking=True), output_size=values.numel()
    )
    in_range = (values >= 0) & (values < rows_of_ids) | (rows_of_ids == _UNCHECKED)
    torch._assert_async(in_range.all(), "an id is not a row of its table")  # pyright: ignore[reportPrivateImportUsage]


def _in_range(
    ids: NDArray[np.integer], lengths: Sequence[int], rows_of_keys: tuple[int, ...]
) -> bool:
    """Returns whether the ids of each key (all keys concatenated) are below the key's number of
    rows and not negative: as unsigned integers, negative ids exceed any number of rows."""
    ids_of_keys = np.array(lengths)
    some = ids_of_keys > 0
    starts = (ids_of_keys.cumsum() - ids_of_keys)[some]
    largest = np.maximum.reduceat(ids.view(f"u{ids.itemsize}"), starts)
    rows = np.array(rows_of_keys)[some]
    return bool(((largest < rows.astype(np.uint64)) | (rows == _UNCHECKED)).all())


@lru_cache(maxsize=256)
def _tensor(rows: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # A table may have more rows than int32 can represent; int32 ids then reach only some of them.
    return torch.tensor(rows).clamp_(max=torch.iinfo(dtype).max).to(dtype).to(device)


def _wrong_id(features: KeyedJaggedTensor, tables: Mapping[str, LookedUp]) -> OptionError:
    bags = features.to_dict()
    for name, (table, rows) in tables.items():
        ids = bags[name].values() if name in bags else torch.empty(0)
        wrong = ids[(ids < 0) | (ids >= rows)]
        if len(wrong):
            return OptionError(
                f"feature {name!r} has the id {int(wrong[0])}, and its table {table!r} has rows 0 "
                f"to {rows - 1}; map ids to rows first, unknown ones to a row of their own"
            )
    raise AssertionError("no id is out of range")
