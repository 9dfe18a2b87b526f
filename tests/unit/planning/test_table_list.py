"""Lists of tables: what is read, counted and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.types import DataType

from esmm_torchrec.errors import PlanError
from esmm_torchrec.models.methods import ModelOptions, build_train_task
from esmm_torchrec.planning.table_list import (
    MAX_TABLE_VALUES,
    PlannedFeature,
    PlannedTable,
    TableList,
    read_tables,
    tables_of_model,
)
from esmm_torchrec.schema import IdFeature, Schema, Table
from esmm_torchrec.sharding.plan_file import embedding_tables

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
    ("tables: []", "tables: expected 'array' of length >= 1"),
    ("{}", "missing required field 'tables'"),
    ("- a", "expected 'object', got 'array'"),
    (f"batchsize: 3\ntables: [{{{ITEM}}}]", "unknown field 'batchsize'; use tables or batch_size"),
    (f"batch_size: 0\ntables: [{{{ITEM}}}]", "batch_size: expected 'int' >= 1"),
    ("tables: [item]", "table 1: expected 'object', got 'str'"),
    ("tables: [{name: item, embedding_dim: 16}]", r"table 1 \('item'\): .* 'num_embeddings'"),
    (f"tables: [{{{ITEM}, colour: red}}]", r"1 \('item'\): .* unknown field 'colour'"),
    ("tables: [{name: item, num_embeddings: 1e6, embedding_dim: 16}]", "expected 'int', got"),
    ("tables: [{name: item, num_embeddings: 10, embedding_dim: 18}]", "18 is not a positive mult"),
    ("tables: [{name: a.b, num_embeddings: 10, embedding_dim: 16}]", "call it 'a_b'"),
    ("tables: [{name: items, num_embeddings: 1, embedding_dim: 16}]", "call it 'items_table'"),
    ("tables: [{name: keys, num_embeddings: 1, embedding_dim: 16}]", "call it 'keys_table'"),
    ("tables: [{name: training, num_embeddings: 1, embedding_dim: 16}]", "name 'training'"),
    ("tables: [{name: forward, num_embeddings: 1, embedding_dim: 16}]", "name 'forward'"),
    ("tables: [{name: a, num_embeddings: 100000000000000000000, embedding_dim: 4}]", "more than"),
    (f"tables: [{{name: a, num_embeddings: {2**62}, embedding_dim: 4}}]", "more than the"),
    (f"tables: [{{{ITEM}, count: 1000000000}}]", "count: expected 'int' <= 10000"),
    (f"tables: [{{{ITEM}, features: 1000000000}}]", "features: expected 'int' <= 10000"),
    (f"tables: [{{{ITEM}, pooling: max}}]", "pooling: invalid enum value 'max'; use sum or mean"),
    (f"tables: [{{{ITEM}, data_type: int4}}]", "value 'int4'; use float32, float16"),
    (f"tables: [{{{ITEM}, weighted: 1}}]", "weighted: expected 'bool', got 'int'"),
    (f"tables: [{{{ITEM}, weighted: true, pooling: mean}}]", "no weighted mean"),
    (f"tables: [{{{ITEM}, pooling_factor: 0}}]", "pooling_factor: expected 'float' > 0.0"),
    (f"tables: [{{{ITEM}, pooling_factor: [1, 2]}}]", "has 2 numbers for 1 features"),
    (f"tables: [{{{ITEM}, shared_by: 0.5}}]", "shared_by: expected 'float' >= 1.0"),
    (f"tables: [{{{ITEM}, count: 0}}]", "count: expected 'int' >= 1"),
    (f"tables: [{{{ITEM}, features: []}}]", "features: expected 'array' of length >= 1"),
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


def test_the_tables_of_a_model_have_its_names() -> None:
    schema = Schema(
        tables=(Table("a.shop", 100), Table("items", 9), Table("history", 50)),
        id_features=(
            IdFeature("age", "items", shared=True),
            IdFeature("shop", "a.shop"),
            IdFeature("clicked", "history", multi_valued=True, weighted=True, shared=True),
        ),
        dense_features=("price", "rank"),
    )

    def listed(method: str) -> TableList:
        options = ModelOptions(method=method, embedding_dim=16, tower=(8,))
        return tables_of_model(
            build_train_task(schema, options),
            schema,
            mean_ids_per_bag={"clicked": 70.0, "age": 0.9},
            shared_by=58.0,
            source="data",
        )

    one = listed("esmm")
    by_feature = {table.features[0].name: table for table in one.tables}
    assert len(one.tables) == len(by_feature) == 3
    shop, age, clicked = (by_feature[name] for name in ("shop", "age", "clicked"))
    assert (shop.name, shop.num_embeddings, shop.shared_by) == ("a_shop", 100, 1.0)
    assert (age.name, age.shared_by, age.features[0].pooling_factor) == ("items_table", 58.0, 0.9)
    assert (clicked.weighted, clicked.features[0].pooling_factor) == (True, 70.0)
    assert one.tower_width == 3 * 16 + 2
    assert one.not_trainable is None

    # Two networks have two sets of tables, and each looks up every feature once.
    two = listed("division")
    model = build_train_task(schema, ModelOptions(method="division", tower=(8,)))
    assert {table.name for table in two.tables} == set(embedding_tables(model))
    assert len(two.tables) == 6
    assert two.tower_width == one.tower_width


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ("data_type: float16", "table 'b' is float16"),
        ("pooling: mean", "table 'b' has mean pooling"),
        ("embedding_dim: 8", "tables 'a' and 'b' have 16 and 8"),
        ("weighted: true", None),
    ],
)
def test_what_train_cannot_have_is_said(tmp_path: Path, fields: str, reason: str | None) -> None:
    dim = "" if "embedding_dim" in fields else "embedding_dim: 16, "
    tables = read(
        tmp_path,
        "tables:\n  - {name: a, num_embeddings: 5, embedding_dim: 16}\n"
        f"  - {{name: b, num_embeddings: 5, {dim}{fields}}}",
    )
    found = tables.not_trainable
    assert found is None if reason is None else reason in str(found)


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
