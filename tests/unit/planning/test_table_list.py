"""Lists of tables: what is read, counted and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.types import DataType

from esmm_torchrec.errors import PlanError
from esmm_torchrec.planning.table_list import (
    MAX_TABLE_VALUES,
    PlannedFeature,
    PlannedTable,
    TableList,
    read_tables,
    tables_of_schema,
)
from esmm_torchrec.schema import IdFeature, Schema, Table

PLANS = Path(__file__).parents[3] / "examples" / "plans"


def read(tmp_path: Path, text: str) -> TableList:
    path = tmp_path / "tables.yaml"
    path.write_text(text)
    return read_tables(path)


def test_fields_left_out_have_the_plainest_meaning(tmp_path: Path) -> None:
    tables = read(tmp_path, "tables: [{name: item, num_embeddings: 10, embedding_dim: 16}]")
    assert tables.batch_size is None
    assert tables.tables == (PlannedTable("item", 10, 16, (PlannedFeature("item"),)),)


def test_every_field_is_read(tmp_path: Path) -> None:
    tables = read(
        tmp_path,
        """
batch_size: 512
tables:
  - name: shop
    num_embeddings: 1_000
    embedding_dim: 8
    features: [shop, clicked]
    pooling: mean
    pooling_factor: [1, 20.5]
    data_type: float16
    shared_by: 58
  - {name: cross, num_embeddings: 5, embedding_dim: 4, weighted: true, features: 2, count: 2}
""",
    )
    assert tables.batch_size == 512
    shop, *crosses = tables.tables
    assert shop == PlannedTable(
        "shop",
        1000,
        8,
        (PlannedFeature("shop", 1), PlannedFeature("clicked", 20.5)),
        pooling="mean",
        data_type="float16",
        shared_by=58,
    )
    assert [table.name for table in crosses] == ["cross_0", "cross_1"]
    assert {table.family for table in crosses} == {"cross"}
    assert [f.name for f in crosses[1].features] == ["cross_feature_0_1", "cross_feature_1_1"]
    assert all(table.weighted for table in crosses)
    assert tables.num_embeddings == 1000 + 2 * 5
    assert tables.nbytes == 1000 * 8 * 2 + 2 * 5 * 4 * 4
    assert tables.tower_width == 2 * 8 + 2 * 2 * 4


def test_the_module_is_the_list_and_allocates_nothing(tmp_path: Path) -> None:
    tables = read(
        tmp_path,
        """
tables:
  - {name: huge, num_embeddings: 4_000_000_000, embedding_dim: 128, pooling: mean}
  - {name: weighted, num_embeddings: 5, embedding_dim: 4, weighted: true, data_type: float16}
""",
    )
    module = tables.to_module()
    collections = [c for c in module.modules() if isinstance(c, EmbeddingBagCollection)]
    assert [c.is_weighted() for c in collections] == [False, True]
    (huge,), (weighted,) = [c.embedding_bag_configs() for c in collections]
    assert (huge.num_embeddings, huge.pooling) == (4_000_000_000, PoolingType.MEAN)
    assert (weighted.data_type, weighted.pooling) == (DataType.FP16, PoolingType.SUM)
    assert {p.device for p in module.parameters()} == {torch.device("meta")}
    assert sum(p.numel() * p.element_size() for p in module.parameters()) == tables.nbytes


ITEM = "name: item, num_embeddings: 10, embedding_dim: 16"
MISTAKES = [
    ("tables: []", "at least one table"),
    ("{}", "'tables' must be a list"),
    ("- a", "must be a mapping"),
    (f"batchsize: 3\ntables: [{{{ITEM}}}]", "no field 'batchsize'"),
    (f"batch_size: 0\ntables: [{{{ITEM}}}]", "batch_size must be a whole number"),
    ("tables: [item]", "table 1 must be a mapping"),
    ("tables: [{name: item, embedding_dim: 16}]", r"table 1 \('item'\) lacks 'num_embeddings'"),
    (f"tables: [{{{ITEM}, colour: red}}]", r"table 1 \('item'\): there is no field 'colour'"),
    ("tables: [{name: item, num_embeddings: 1e6, embedding_dim: 16}]", "not '1e6'"),
    ("tables: [{name: item, num_embeddings: 10, embedding_dim: 18}]", "18 is not a positive mult"),
    ("tables: [{name: a.b, num_embeddings: 10, embedding_dim: 16}]", "without dots"),
    ("tables: [{name: items, num_embeddings: 1, embedding_dim: 16}]", "call it 'items_table'"),
    ("tables: [{name: keys, num_embeddings: 1, embedding_dim: 16}]", "call it 'keys_table'"),
    ("tables: [{name: training, num_embeddings: 1, embedding_dim: 16}]", "name 'training'"),
    ("tables: [{name: forward, num_embeddings: 1, embedding_dim: 16}]", "name 'forward'"),
    ("tables: [{name: a, num_embeddings: 100000000000000000000, embedding_dim: 4}]", "more than"),
    (f"tables: [{{name: a, num_embeddings: {2**62}, embedding_dim: 4}}]", "more than the"),
    (f"tables: [{{{ITEM}, count: 1000000000}}]", "count must be at most 10000"),
    (f"tables: [{{{ITEM}, features: 1000000000}}]", "must be at most 10000"),
    (f"tables: [{{{ITEM}, pooling: max}}]", "pooling must be sum or mean, not 'max'"),
    (f"tables: [{{{ITEM}, data_type: int4}}]", "data_type must be float32 or float16 or bfloat16"),
    (f"tables: [{{{ITEM}, weighted: 1}}]", "weighted must be true or false"),
    (f"tables: [{{{ITEM}, weighted: true, pooling: mean}}]", "no weighted mean"),
    (f"tables: [{{{ITEM}, pooling_factor: 0}}]", "pooling_factor must be a number above 0"),
    (f"tables: [{{{ITEM}, pooling_factor: [1, 2]}}]", "has 2 numbers for 1 features"),
    (f"tables: [{{{ITEM}, shared_by: 0.5}}]", "shared_by must be at least 1"),
    (f"tables: [{{{ITEM}, count: 0}}]", "count must be a whole number of at least 1"),
    (f"tables: [{{{ITEM}, features: []}}]", "features must be a list of names"),
    (f"tables: [{{{ITEM}}}, {{{ITEM}}}]", r"table 2 \('item'\): the table name 'item' is taken"),
    (f"tables: [{{{ITEM}}}, {{name: b, num_embeddings: 1, embedding_dim: 4, features: [item]}}]",
     "the feature name 'item' is taken by table 1"),
    (f"tables:\n  - {{{ITEM}, name: other}}", "line 2 .*'name' occurs twice"),
    ("tables: [{", "line 1 is not the YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), MISTAKES)
def test_mistakes_are_named_with_file_and_entry(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(PlanError, match=expected) as raised:
        read(tmp_path, text)
    assert str(raised.value).startswith(str(tmp_path / "tables.yaml"))
    assert "\n" not in str(raised.value)


def test_the_largest_table_has_sizes_that_torch_can_count(tmp_path: Path) -> None:
    text = f"tables: [{{name: a, num_embeddings: {MAX_TABLE_VALUES // 4}, embedding_dim: 4}}]"
    (parameter,) = read(tmp_path, text).to_module().parameters()
    assert parameter.numel() * parameter.element_size() == 4 * MAX_TABLE_VALUES


def test_a_schema_is_a_list_of_tables() -> None:
    schema = Schema(
        tables=(Table("shop", 100), Table("age", 9), Table("history", 50)),
        id_features=(
            IdFeature("age", "age", shared=True),
            IdFeature("shop", "shop"),
            IdFeature("bought", "shop", shared=True),
            IdFeature("clicked", "history", multi_valued=True, weighted=True, shared=True),
        ),
        dense_features=("price", "rank"),
    )
    tables = tables_of_schema(
        schema,
        16,
        mean_values_per_bag={"clicked": 70.0, "age": 0.9},
        impressions_per_shared_row=58.0,
        source="data",
    )
    # A table that also serves a feature of the impression is pooled for every impression.
    assert tables.tables == (
        PlannedTable("shop", 100, 16, (PlannedFeature("shop"), PlannedFeature("bought"))),
        PlannedTable("age", 9, 16, (PlannedFeature("age", 0.9),), shared_by=58.0),
        PlannedTable(
            "history", 50, 16, (PlannedFeature("clicked", 70.0),), weighted=True, shared_by=58.0
        ),
    )
    assert tables.tower_width == 4 * 16 + 2


@pytest.mark.parametrize(
    ("name", "number", "rows", "terabytes"),
    [
        ("ali_ccp", 23, 2_175_092, 0.000139),
        ("product", 22, 115_030_300, 0.0092),
        ("two_hundred_tables", 200, 1_800_000_000, 0.4864),
        ("ten_terabyte", 363, 22_320_000_000, 10.0),
    ],
)
def test_the_examples_are_what_they_say(
    name: str, number: int, rows: int, terabytes: float
) -> None:
    tables = read_tables(PLANS / f"{name}.yaml")
    assert len(tables.tables) == number
    assert tables.num_embeddings == rows
    assert tables.nbytes / 1e12 == pytest.approx(terabytes, rel=0.01)
    named = {table.name: table.num_embeddings for table in tables.tables}
    if name == "product":
        assert (named["item"], named["user"]) == (23_500_000, 48_000_000)
