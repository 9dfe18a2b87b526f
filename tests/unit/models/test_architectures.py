"""Architectures and interactions against loops over experts and features, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.distributed.train_pipeline.tracing import Tracer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec.batch import BatchFeatures, ImpressionBatch
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.architectures.aitm import Aitm
from esmm_torchrec.models.architectures.mmoe import Mmoe
from esmm_torchrec.models.architectures.ple import Ple
from esmm_torchrec.models.architectures.separate import Separate
from esmm_torchrec.models.architectures.shared_bottom import SharedBottom
from esmm_torchrec.models.esmm import ESMM
from esmm_torchrec.models.interactions.dcn import Dcn
from esmm_torchrec.models.interactions.deepfm import DeepFm
from esmm_torchrec.models.interactions.none import NoInteraction
from esmm_torchrec.models.methods import ModelOptions, build_train_task
from esmm_torchrec.models.parts import Architecture, Builder, Head, Interaction
from esmm_torchrec.models.towers import Tower
from esmm_torchrec.schema import IdFeature, Schema, Table
from esmm_torchrec.tasks import DEFAULT_TASKS, Task, TaskChain

CART = TaskChain(
    (Task("click", "click", short="ctr"), Task("cart", "cart", given="click"),
     Task("order", "bought", given="cart"))
)  # fmt: skip
SCHEMA = Schema(
    tables=(Table("item", 30), Table("user", 20)),
    id_features=(IdFeature("item", "item"), IdFeature("user", "user")),
    dense_features=("price",),
)
DIM, WIDTHS, ROWS = 8, (16, 12, 6), 33
IN_FEATURES = 2 * DIM + 1
ARCHITECTURES = (
    Mmoe(), Mmoe(num_experts=3, expert_layers=2), Mmoe(expert_layers=3),
    Ple(), Ple(num_experts=3, levels=1), Ple(num_experts=1, levels=3), Aitm(),
)  # fmt: skip
KINDS = (SharedBottom(), Separate(), Mmoe(), Ple(), Aitm())


def _task(
    architecture: Architecture,
    *,
    tasks: TaskChain = DEFAULT_TASKS,
    dtype: str = "float32",
    interaction: Interaction | None = None,
) -> nn.Module:
    options = ModelOptions(
        architecture=architecture,
        interaction=interaction,
        embedding_dim=DIM,
        tower=WIDTHS,
        dtype=dtype,  # pyright: ignore[reportArgumentType]
    )
    return build_train_task(replace(SCHEMA, tasks=tasks), options, seed=3, embedding_device="cpu")


def _features(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, IN_FEATURES, generator=torch.Generator().manual_seed(seed))


def _batch(rows: int, tasks: TaskChain) -> ImpressionBatch:
    generator = torch.Generator().manual_seed(rows)
    happened = torch.randint(0, 2, (len(tasks), rows), generator=generator).float().cumprod(0)
    ids = torch.randint(0, 20, (2 * rows,), generator=generator)
    return ImpressionBatch(
        sparse_features=KeyedJaggedTensor(
            ["item", "user"], ids, lengths=torch.ones(2 * rows, dtype=torch.int64)
        ),
        dense_features=torch.randn(rows, 1, generator=generator),
        labels=dict(zip(tasks.labels, happened, strict=True)),
    )


def _read_out(tower: Tower, hidden: torch.Tensor) -> torch.Tensor:
    for layer in tower.hidden:
        hidden = layer(hidden).relu()
    return tower.logit(hidden).squeeze(1)


def _mmoe(towers: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Ma et al., KDD 2018, one expert after the other."""
    outputs = []
    for expert in range(len(towers.experts[0].weight)):
        hidden = x
        for layer in towers.experts:
            hidden = (hidden @ layer.weight[expert] + layer.bias[expert]).relu()
        outputs.append(hidden)
    logits = []
    for task, tower in enumerate(towers.towers.values()):
        gate = (x @ towers.gates.weight[task] + towers.gates.bias[task]).softmax(dim=1)
        mix = sum(gate[:, [e]] * output for e, output in enumerate(outputs))
        logits.append(_read_out(tower, mix))
    return logits


def _ple(towers: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Tang et al., RecSys 2020, one expert after the other."""
    inputs = [x] * (len(towers.towers) + 1)
    for level in towers.levels:
        outputs = []
        for group, own in enumerate(inputs):
            hidden = (own @ level.experts.weight[group] + level.experts.bias[group]).relu()
            outputs.append(hidden.chunk(level._num_experts, dim=1))
        after = []
        for task in range(len(towers.towers)):
            gate = inputs[task] @ level.gates.weight[task] + level.gates.bias[task]
            choices = [*outputs[task], *outputs[-1]]
            shares = gate.softmax(dim=1).unbind(1)
            after.append(sum(s[:, None] * c for s, c in zip(shares, choices, strict=True)))
        if level.shared_gate is not None:
            gate = inputs[-1] @ level.shared_gate.weight[0] + level.shared_gate.bias[0]
            choices = [expert for group in outputs for expert in group]
            shares = gate.softmax(dim=1).unbind(1)
            after.append(sum(s[:, None] * c for s, c in zip(shares, choices, strict=True)))
        inputs = after
    towers_of = towers.towers.values()
    return [_read_out(tower, own) for tower, own in zip(towers_of, inputs, strict=True)]


def _aitm(towers: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Xi et al., KDD 2021, one impression and task after the other."""
    before, logits = None, []
    for name, tower in towers.towers.items():
        own = x
        for layer in tower.hidden:
            own = layer(own).relu()
        if before is not None:
            transfer = towers.transfers[name]
            passed_on = transfer.passed_on(before).relu()
            rows = []
            for pair in zip(passed_on, own, strict=True):
                scores = torch.stack(
                    [transfer.key(u) @ transfer.query(u) / len(u) ** 0.5 for u in pair]
                ).softmax(0)
                rows.append(sum(s * transfer.value(u) for s, u in zip(scores, pair, strict=True)))
            own = torch.stack(rows)
        before = own
        logits.append(tower.logit(own).squeeze(1))
    return logits


NAIVE: dict[type, Callable[[nn.Module, torch.Tensor], list[torch.Tensor]]] = {
    Mmoe: _mmoe, Ple: _ple, Aitm: _aitm,
}  # fmt: skip


@pytest.mark.parametrize("tasks", [DEFAULT_TASKS, CART], ids=["two tasks", "three tasks"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.25)])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_batched_products_are_the_loop_over_experts(
    architecture: Architecture, dtype: str, tolerance: float, tasks: TaskChain
) -> None:
    towers = _task(architecture, tasks=tasks, dtype=dtype).get_submodule("model.towers")
    exact = copy.deepcopy(towers).double()
    given, wanted = _features().requires_grad_(), _features().double().requires_grad_()
    logits = towers(given)
    reference = NAIVE[type(architecture)](exact, wanted)
    assert list(logits) == list(tasks.names)
    assert all(logit.dtype == torch.float32 for logit in logits.values())
    upstream = torch.randn(len(tasks), ROWS, generator=torch.Generator().manual_seed(2))
    (torch.stack(list(logits.values())) * upstream).sum().backward()
    (torch.stack(reference) * upstream).sum().backward()
    pairs = [*zip(logits.values(), reference, strict=True), (given.grad, wanted.grad)]
    for own, other in zip(towers.parameters(), exact.parameters(), strict=True):
        assert own.dtype == torch.float32
        # Of a bfloat16 gate a gradient is mostly rounding.
        pairs += [(own.grad, other.grad)] if dtype == "float32" else []
    for value, expected in pairs:
        assert value is not None
        assert expected is not None
        assert expected.norm() > 0
        assert (value.double() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("interaction", [None, Dcn(), DeepFm()], ids=["none", "dcn", "deepfm"])
@pytest.mark.parametrize("architecture", KINDS, ids=lambda kind: type(kind).__name__)
def test_pipelines_trace_every_combination_for_batches_of_any_size(
    architecture: Architecture, interaction: Interaction | None
) -> None:
    task = _task(architecture, tasks=CART, interaction=interaction)
    collections = [
        name for name, _ in task.named_modules() if name.endswith(".embedding_bag_collection")
    ]
    assert collections
    graph = Tracer(leaf_modules=collections).trace(task)
    traced = torch.fx.GraphModule(task, graph)
    for rows in (12, 30, 3):
        batch = _batch(rows, CART)
        assert torch.equal(traced(batch)[0], task(batch)[0])


@pytest.mark.parametrize(
    ("architecture", "interaction", "dtype"),
    [
        (Mmoe(), Dcn(), "float32"), (Mmoe(), None, "bfloat16"), (Ple(), DeepFm(), "float32"),
        (Ple(), None, "bfloat16"), (Aitm(), None, "float32"), (Aitm(), Dcn(), "bfloat16"),
    ],
    ids=str,
)  # fmt: skip
def test_towers_compile_whole(
    architecture: Architecture, interaction: Interaction | None, dtype: str
) -> None:
    torch._dynamo.reset()
    task = _task(architecture, dtype=dtype, interaction=interaction)
    towers = task.get_submodule("model.towers")
    compiled = torch.compile(towers, backend="aot_eager", fullgraph=True)
    gradients = []
    for module in (towers, compiled):
        towers.zero_grad()
        logits = module(_features())
        torch.stack(list(logits.values())).square().sum().backward()
        gradients.append([value.grad for value in towers.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(dict(compiled(_features())), dict(towers(_features())))


def test_what_architectures_have_in_common_starts_alike() -> None:
    plain = dict(_task(SharedBottom()).state_dict())
    for architecture in (Mmoe(), Ple(), Aitm()):
        other = dict(_task(architecture).state_dict())
        tables = [name for name in plain if ".features." in name]
        assert tables
        assert all(torch.equal(plain[name], other[name]) for name in tables)
    towers = {name: value for name, value in plain.items() if ".towers." in name}
    aitm = _task(Aitm()).state_dict()
    for name, value in towers.items():
        assert torch.equal(aitm[name.replace(".towers.", ".towers.towers.")], value)


def test_mmoe_of_one_expert_is_a_shared_layer_below_towers() -> None:
    towers = _task(Mmoe(num_experts=1)).get_submodule("model.towers")
    layer = towers.experts[0]
    hidden = (_features() @ layer.weight[0] + layer.bias[0]).relu()
    for name, logit in towers(_features()).items():
        torch.testing.assert_close(logit, towers.towers[name](hidden))


def test_the_machine_of_deepfm_sums_the_inner_products_of_all_pairs() -> None:
    count, dim = 5, 4
    features = torch.randn(7, count * dim + 3, dtype=torch.float64)
    module = DeepFm(width=6).build(count * dim + 3, count, dim).double()
    embeddings = features[:, : count * dim].view(7, count, dim)
    pairs = sum(
        (embeddings[:, i] * embeddings[:, j]).sum(1) for i, j in combinations(range(count), 2)
    )
    out = module(features)
    assert out.shape == (7, module.out_features)
    torch.testing.assert_close(out[:, -1], pairs)
    torch.testing.assert_close(out[:, : count * dim + 3], features)


def test_cross_layers_are_those_of_dcn_v2() -> None:
    module = Dcn(num_layers=2, low_rank=3).build(10, 2, 4).double()
    x = start = torch.randn(7, 10, dtype=torch.float64)
    for layer in range(2):
        w, v = module.cross.W_kernels[layer], module.cross.V_kernels[layer]
        x = start * (x @ v.T @ w.T + module.cross.bias[layer].flatten()) + x
    torch.testing.assert_close(module(start), x)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            lambda: Mmoe(num_experts=0),
            "`architecture.num_experts` 0 is out of range; give 1 or more",
        ),
        (lambda: Ple(levels=0), "`architecture.levels` 0 is out of range; give 1 or more"),
        (lambda: Dcn(low_rank=0), "`interaction.low_rank` 0 is out of range; give 1 or more"),
        (lambda: DeepFm(width=0), "`interaction.width` 0 is out of range; give 1 or more"),
        (lambda: _task(Mmoe(expert_layers=4)), "is more than the 3 widths of `tower`"),
        (lambda: _task(Ple(levels=4)), "`architecture.levels` 4 is more than the 3 widths"),
    ],
)
def test_options_out_of_range_are_refused(build: Callable[[], object], sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        build()


def test_aitm_needs_tasks_that_follow_one_another() -> None:
    with pytest.raises(OptionError, match="passes from one task to the next"):
        build_train_task(SCHEMA, ModelOptions(method="division", architecture=Aitm()))


@pytest.mark.parametrize("architecture", KINDS, ids=lambda kind: type(kind).__name__)
def test_a_task_may_be_called_as_a_method_of_torch_modules(architecture: Architecture) -> None:
    schema = replace(SCHEMA, tasks=TaskChain.of("click", "apply", "items"))
    options = ModelOptions(embedding_dim=DIM, tower=WIDTHS, architecture=architecture)
    task = build_train_task(schema, options, embedding_device="cpu")
    features = KeyedJaggedTensor(
        keys=["item", "user"], values=torch.tensor([1, 2, 3, 4]), lengths=torch.ones(4).int()
    )
    logits = task.model(BatchFeatures(features, dense_features=torch.zeros(2, 1)))
    assert set(logits) == {"click", "apply", "items"}


class _Plain(SharedBottom):
    """Builds its towers by itself."""

    def build(self, heads: Sequence[Head], builder: Builder) -> nn.Module:
        features = builder.features(heads[-1].name)
        return ESMM(
            features.embedding_bag_collection,
            dense_in_features=features.dense_in_features,
            towers=builder.towers(heads, features.out_features),
        )


@pytest.mark.parametrize(
    "unused", [{"first_order": True}, {"first_order": False, "interaction": Dcn()}]
)
def test_what_an_architecture_does_not_use_is_refused(unused: dict[str, Any]) -> None:
    options = ModelOptions(embedding_dim=DIM, tower=WIDTHS, architecture=_Plain(), **unused)
    (option, *_), value = [name for name in unused if unused[name]], "_Plain does not use"
    with pytest.raises(OptionError, match=f"architecture {value} `{option}`; leave it out"):
        build_train_task(SCHEMA, options, embedding_device="cpu")
    plain = replace(options, first_order=False, interaction=NoInteraction())
    build_train_task(SCHEMA, plain, embedding_device="cpu")
