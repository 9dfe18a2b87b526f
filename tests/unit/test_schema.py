"""Schemas: what is refused, what goes into which collection, to JSON and back."""

from __future__ import annotations

import json
import re

import pytest

from esmm_torchrec.errors import DataError, OptionError
from esmm_torchrec.schema import RESERVED_COLUMNS, IdFeature, Schema, Table, weight_column
from esmm_torchrec.tasks import TaskChain

ITEM = Table("item", 5)
PLAIN = IdFeature("item", "item")


def test_json_and_back() -> None:
    schema = Schema(
        (ITEM, Table("age", 3)),
        (
            PLAIN,
            IdFeature("seen", "item", multi_valued=True, weighted=True),
            IdFeature("age", "age", shared=True),
        ),
        ("price",),
    )
    assert Schema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema
    assert schema.has_shared_features
    assert schema.weighted_tables == {"item"}
    assert schema.table("age").num_embeddings == 3
    with pytest.raises(KeyError):
        schema.table("nobody's")


@pytest.mark.parametrize(
    ("tables", "features", "dense", "sentence"),
    [
        ((ITEM, ITEM), (PLAIN,), (), "table 'item' occurs twice; give each table its own name"),
        ((ITEM,), (PLAIN, PLAIN), (), "feature 'item' occurs twice"),
        ((ITEM,), (PLAIN,), ("item",), "feature 'item' occurs twice"),
        (
            (ITEM,),
            (IdFeature("a", "item", weighted=True), IdFeature(weight_column("a"), "item")),
            (),
            "feature 'a__weight' occurs twice",
        ),
        ((ITEM,), (IdFeature("item", "shop"),), (), "'item' names the unknown table 'shop'"),
        ((Table("item", 0),), (PLAIN,), (), "table 'item' has no rows; it needs at least row 0"),
        ((ITEM, Table("shop", 4)), (PLAIN,), (), "table 'shop' is used by no feature; remove it"),
        *(
            ((ITEM,), (PLAIN,), (name,), f"no feature may be called '{name}'; rename the column")
            for name in sorted(RESERVED_COLUMNS)
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    tables: tuple[Table, ...],
    features: tuple[IdFeature, ...],
    dense: tuple[str, ...],
    sentence: str,
) -> None:
    with pytest.raises(DataError, match=re.escape(sentence)):
        Schema(tables, features, dense)


def test_a_table_is_in_one_collection_only() -> None:
    """Whatever its features are, or two copies of it would be trained."""
    kinds = [
        IdFeature(f"{shared}{weighted}{number}", "item", weighted=weighted, shared=shared)
        for number, (shared, weighted) in enumerate(
            (shared, weighted) for shared in (False, True) for weighted in (False, True)
        )
    ]
    for first in kinds:
        for second in kinds:
            if first is second:
                continue
            collections = Schema((ITEM,), (first, second)).collections
            ((name, features),) = collections.items()
            assert features == (first, second)
            assert ("weighted" in name) == (first.weighted or second.weighted)
            assert name.startswith("shared_") == (first.shared and second.shared)


def test_a_task_cannot_be_called_as_what_is_counted_already() -> None:
    with pytest.raises(OptionError, match="cannot be called 'impression', because metrics"):
        TaskChain.of("impression", "click")
