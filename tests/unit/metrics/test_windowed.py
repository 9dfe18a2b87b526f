"""TorchRec's windowed metrics, fed by this library, against the exact ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchrec.metrics.metrics_config import RecMetricEnum

from esmm_torchrec.errors import OptionError
from esmm_torchrec.metrics.probability import Prediction, product
from esmm_torchrec.metrics.report import measure
from esmm_torchrec.metrics.scored import ScoredImpressions
from esmm_torchrec.metrics.windowed import (
    metric_module,
    metrics_config,
    model_output,
    windowed_figures,
)
from esmm_torchrec.models.scores import probabilities, read_scores
from esmm_torchrec.tasks import Task, TaskChain

BATCH, STEPS, PADDING = 512, 6, 100
FIGURES = [f"{task}_{metric}" for task in ("ctr", "cvr", "ctcvr") for metric in
           ("ne", "auc", "calibration")]  # fmt: skip


def batch(seed: int) -> dict[str, torch.Tensor]:
    """Logits and labels of a batch whose last rows are padding, labelled as they never are."""
    random = torch.Generator().manual_seed(seed)
    click_logit = torch.randn(BATCH, generator=random) - 1
    conversion_logit = torch.randn(BATCH, generator=random)
    click = (torch.rand(BATCH, generator=random) < click_logit.sigmoid()).float()
    converted = torch.rand(BATCH, generator=random) < (0.5 * conversion_logit).sigmoid()
    weight = torch.ones(BATCH)
    weight[-PADDING:] = 0
    click[-PADDING:] = 1
    return {
        "click_logit": click_logit,
        "conversion_logit": conversion_logit,
        "click": click,
        "conversion": click * converted,
        "weight": weight,
    }


def output_of(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    logits = {name: given[f"{name}_logit"] for name in ("click", "conversion")}
    labels = {name: given[name] for name in ("click", "conversion")}
    return model_output(probabilities(logits), labels, given.get("weight"))


def exact_figures(seeds: list[int]) -> dict[str, float]:
    """The report's figures of the rows that are not padding."""
    batches = [batch(seed) for seed in seeds]
    columns = {
        name: torch.cat([each[name][:-PADDING] for each in batches]).numpy() for name in batches[0]
    }
    del columns["weight"]
    for label in ("click", "conversion"):
        columns[label] = columns[label].astype(np.int8)
    ctr, cvr = (Prediction(columns[f"{name}_logit"], "logit") for name in ("click", "conversion"))
    scored = ScoredImpressions(
        labels={name: columns[name] for name in ("click", "conversion")},
        scores={"ctr": ctr, "cvr": cvr, "ctcvr": product(ctr, cvr)},
    )
    test = measure(scored)["test"]
    return {name: test[name] for name in FIGURES}


def run(rank: int, world_size: int, seeds: list[int]) -> dict[str, float]:
    metrics = metric_module(
        batch_size=BATCH,
        world_size=world_size,
        rank=rank,
        device=torch.device("cpu"),
        window_size=BATCH * STEPS * world_size,
        compute_interval_steps=STEPS,
    )
    for step, seed in enumerate(seeds):
        assert step == 0 or not metrics.should_compute()
        metrics.update(output_of(batch(seed)))
    assert metrics.should_compute()
    return windowed_figures(metrics.compute())


def test_figures_of_one_rank_equal_the_exact_ones() -> None:
    figures = run(0, 1, list(range(STEPS)))
    assert sorted(figures) == sorted(FIGURES)
    assert figures == pytest.approx(exact_figures(list(range(STEPS))), abs=2e-6)


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    figures = run(rank, 2, list(range(rank, 2 * STEPS, 2)))
    torch.save(figures, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_figures_of_two_ranks_equal_the_exact_ones(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    figures = torch.load(tmp_path / "0.pt")
    assert sorted(figures) == sorted(FIGURES)
    assert figures == pytest.approx(exact_figures(list(range(2 * STEPS))), abs=2e-6)
    assert torch.load(tmp_path / "1.pt") == {}


def test_the_window_forgets() -> None:
    figures = run(0, 1, list(range(STEPS)))
    metrics = metric_module(
        batch_size=BATCH,
        world_size=1,
        rank=0,
        device=torch.device("cpu"),
        window_size=BATCH * STEPS,
    )
    for seed in [100, 101, *range(STEPS)]:
        metrics.update(output_of(batch(seed)))
    assert windowed_figures(metrics.compute()) == pytest.approx(figures, rel=1e-9)


def test_model_output_is_what_the_labels_say_and_nothing_else_holds_it() -> None:
    given = batch(0)
    output = output_of(given)
    click, conversion, weight = given["click"], given["conversion"], given["weight"]
    expected = {
        "pctr": given["click_logit"].sigmoid(),
        "pcvr": given["conversion_logit"].sigmoid(),
        "pctcvr": given["click_logit"].sigmoid() * given["conversion_logit"].sigmoid(),
        "click_label": click,
        "conversion_label": click * conversion,
        "weight": weight,
        "click_weight": click * weight,
    }
    assert output.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(output[name], value)
        assert output[name].dtype == torch.float32
        assert all(
            output[name].untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
            for tensor in given.values()
        )


def test_weights_default_to_one_and_labels_may_be_integers() -> None:
    given = batch(1)
    expected = output_of({**given, "weight": torch.ones(BATCH)})
    del given["weight"]
    given["click"], given["conversion"] = given["click"].long(), given["conversion"].to(torch.int8)
    given["click_logit"].requires_grad_()
    output = output_of(given)
    for name, value in expected.items():
        torch.testing.assert_close(output[name], value)
        assert not output[name].requires_grad


def test_a_task_without_a_positive_is_left_out() -> None:
    metrics = metric_module(
        batch_size=BATCH, world_size=1, rank=0, device=torch.device("cpu"), window_size=BATCH
    )
    given = batch(2)
    given["conversion"] = torch.zeros(BATCH)
    metrics.update(output_of(given))
    assert sorted(windowed_figures(metrics.compute())) == ["ctr_auc", "ctr_calibration", "ctr_ne"]
    given["click"] = torch.zeros(BATCH)
    metrics.update(output_of(given))
    assert windowed_figures(metrics.compute()) == {}


def test_a_window_smaller_than_a_step_is_refused() -> None:
    with pytest.raises(OptionError, match="at least 8192"):
        metric_module(
            batch_size=4096,
            world_size=2,
            rank=0,
            device=torch.device("cpu"),
            window_size=8191,
        )


def test_the_configuration_can_be_narrowed() -> None:
    config = metrics_config(window_size=1000, metrics=[RecMetricEnum.NE])
    assert list(config.rec_metrics) == [RecMetricEnum.NE]
    assert config.rec_metrics[RecMetricEnum.NE].window_size == 1000
    assert [task.name for task in config.rec_tasks] == ["ctr", "cvr", "ctcvr"]


def test_a_chain_of_three_tasks_has_figures_for_each() -> None:
    tasks = TaskChain(
        (
            Task("click", "click"),
            Task("cart", "in_cart", given="click"),
            Task("order", "ordered", given="cart"),
        )
    )
    random = torch.Generator().manual_seed(5)
    logits = {name: torch.randn(BATCH, generator=random) for name in tasks.names}
    drawn = {
        task.label: (torch.rand(BATCH, generator=random) < logits[task.name].sigmoid()).float()
        for task in tasks
    }
    # Labels after a missing one are ignored.
    metrics = metric_module(
        batch_size=BATCH,
        world_size=1,
        rank=0,
        device=torch.device("cpu"),
        tasks=tasks,
        window_size=BATCH,
    )
    metrics.update(model_output(probabilities(logits, tasks), drawn, tasks=tasks))
    known = read_scores(logits, tasks)
    scored = ScoredImpressions(
        labels={name: label.to(torch.int8).numpy() for name, label in drawn.items()},
        scores={name: Prediction(s.values.numpy(), s.form) for name, s in known.items()},
        tasks=tasks,
    )
    exact = measure(scored)["test"]
    figures = windowed_figures(metrics.compute())
    names = ("click", "cart_given_click", "cart", "order_given_cart", "order")
    expected = {f"{n}_{f}": exact[f"{n}_{f}"] for n in names for f in ("ne", "auc", "calibration")}
    assert figures == pytest.approx(expected, abs=2e-6)
    assert set(windowed_figures(metrics.compute(), known=["order"])) == {
        "order_ne",
        "order_auc",
        "order_calibration",
    }
