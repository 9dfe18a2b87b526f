"""esmm-torchrec plan: tables and machines → estimated sharding plans, before renting any GPU."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esmm_torchrec.choices import check_positive
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.errors import OptionError, PlanError, for_command_line
from esmm_torchrec.models.methods import ModelOptions, build_train_task
from esmm_torchrec.planning.estimates import Estimate, estimate
from esmm_torchrec.planning.experiment import Experiment, comparison
from esmm_torchrec.planning.hardware import Hardware, TowerDtype, preset, read_hardware
from esmm_torchrec.planning.plan_report import write_report
from esmm_torchrec.planning.scenario import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_COLUMN_WIDTH,
    STRATEGIES,
    Kernel,
    Scenario,
    Strategy,
    parse_constraint,
)
from esmm_torchrec.planning.table_list import TableList, read_tables, tables_of_model
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.sharding.plan_json import write_plan
from esmm_torchrec.sharding.planner import STORAGE_MARGIN, SparseOptimizerOption
from esmm_torchrec.sharding.search import distinct_shared_rows

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Options:
    """Estimate how embedding tables could be placed on machines that you do not have.

    Writes OUT/report.html (start there), plans.json, plots/*.png, and, for every strategy and
    number of GPUs that fits, plan-STRATEGY-GPUS.json, which 'train --plan' loads.
    """

    out: Path
    """Folder to create."""
    tables: Path | None = None
    """YAML list of tables: name, num_embeddings, embedding_dim, and optionally features, pooling,
    pooling_factor, weighted, data_type, shared_by, count."""
    data: Path | None = None
    """A prepared data set, instead of --tables."""
    gpus: tuple[int, ...] = (8,)
    """Numbers of GPUs to try; on a CPU, numbers of processes."""
    gpu: str | None = None
    """a100-40, a100-80, h100, h200, b200 or cpu."""
    hardware: Path | None = None
    """YAML file of another machine, instead of --gpu: 'base: h100' and the numbers that differ."""
    strategies: tuple[Strategy, ...] = STRATEGIES
    """Sharding types to try for all tables; auto: TorchRec's planner chooses for each table."""
    batch_size: int | None = None
    """Impressions per GPU and step; by default, the number in the list of tables, else 4096."""
    kernels: tuple[Kernel, ...] = ("fused",)
    """Kernels to choose from. fused_uvm keeps rows in host memory; fused_uvm_caching also caches
    some on the GPU; dense leaves the update to torch's optimisers."""
    cache_load_factor: float | None = None
    """Share of a table's rows that fused_uvm_caching keeps on the GPU; by default, TorchRec's
    0.2."""
    constraint: tuple[str, ...] = ()
    """PATTERN=WORDS, for tables with matching names; overrides the strategy and --kernels.
    WORDS are sharding types, kernels and cache=SHARE, separated by commas. Example:
    'user*=row_wise,fused_uvm_caching,cache=0.1'."""
    sparse_optimizer: SparseOptimizerOption = "rowwise_adagrad"
    """Optimiser of the tables; determines the memory of its state."""
    column_width: int = DEFAULT_COLUMN_WIDTH
    """Minimum number of columns of a shard under column_wise and grid_shard."""
    reserve: float = STORAGE_MARGIN
    """Share of memory to reserve for everything that the estimate does not count."""
    tower: tuple[int, ...] = (360, 200, 80)
    """Widths of the hidden layers of each of the two towers, which are estimated in addition to the
    tables."""
    tower_dtype: TowerDtype = "float32"
    """Data type in which the towers compute."""
    method: str = "esmm"
    """With --data: method to train, as in train; some methods have two sets of tables."""
    embedding_dim: int = 16
    """With --data: number of columns of every table."""
    shuffle_chunk: int = 8
    """With --data: maximum number of impressions of one user that stay together, as in train. It
    determines how often a shared feature is pooled."""


def run(options: Options) -> None:
    """Plans every strategy on every number of GPUs and writes the results.

    Raises:
        EsmmTorchrecError: an option, the list of tables or the machine is invalid, or no plan
            fits.
    """
    scenario = _scenario(options)
    counts = sorted(set(options.gpus))
    if not counts or not options.strategies:
        raise OptionError("--gpus and --strategies need at least one value each")
    for count in counts:
        scenario.hardware.local_world_size(count)
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise OptionError(f"--out {options.out} already exists; remove it or choose another")
    strategies: list[Strategy] = [name for name in STRATEGIES if name in options.strategies]
    found: list[Estimate] = []
    with progress_bar("planning", total=len(counts) * len(strategies), unit="plans") as bar:
        for count in counts:
            for strategy in strategies:
                bar.set_postfix_str(f"{strategy}, {count}", refresh=False)
                found.append(estimate(scenario, strategy, count))
                bar.update(1)
    experiment = Experiment(scenario=scenario, estimates=tuple(found))
    options.out.mkdir(parents=True, exist_ok=True)
    _write(experiment, options.out)
    print(_summary(experiment, options.out))
    if not any(result.placed for result in found):
        raise PlanError(
            f"no plan on {experiment.ranks(counts[-1])} of {scenario.hardware.name}: "
            f"{experiment.of(strategies[0], counts[-1]).reason}; {options.out / 'report.html'} "
            "lists every strategy and what would fit"
        )


def _scenario(options: Options) -> Scenario:
    if options.batch_size is not None:
        check_positive(batch_size=options.batch_size)
    if (options.tables is None) == (options.data is None):
        raise OptionError("give either --tables FILE or --data PREPARED")
    tables = read_tables(options.tables) if options.tables else _tables_of_data(options)
    return Scenario(
        tables=tables,
        hardware=_hardware(options),
        batch_size=options.batch_size or tables.batch_size or DEFAULT_BATCH_SIZE,
        kernels=options.kernels,
        cache_load_factor=options.cache_load_factor,
        sparse_optimizer=options.sparse_optimizer,
        constraints=tuple(parse_constraint(text) for text in options.constraint),
        column_width=options.column_width,
        reserve=options.reserve,
        towers=options.tower,
        tower_dtype=options.tower_dtype,
    )


def _hardware(options: Options) -> Hardware:
    if (options.gpu is None) == (options.hardware is None):
        raise OptionError("give either --gpu NAME or --hardware FILE")
    return preset(options.gpu) if options.gpu else read_hardware(options.hardware or Path())


def _tables_of_data(options: Options) -> TableList:
    assert options.data is not None
    check_positive(shuffle_chunk=options.shuffle_chunk)
    data = PreparedDataSet.open(options.data, data_files=False)
    counts, rows_per_rank = data.splits["train"], options.batch_size or DEFAULT_BATCH_SIZE
    shared_by = 1.0
    if counts.shared_rows:
        shared_by = rows_per_rank / distinct_shared_rows(
            rows_per_rank,
            impressions=counts.impressions,
            shared_rows=counts.shared_rows,
            shuffle_chunk=options.shuffle_chunk,
        )
    model = ModelOptions(
        method=options.method, embedding_dim=options.embedding_dim, tower=options.tower
    )
    return tables_of_model(
        build_train_task(data.schema, model),
        data.schema,
        mean_ids_per_bag=data.statistics.mean_values_per_bag,
        shared_by=shared_by,
        source=str(options.data),
    )


def _write(experiment: Experiment, out: Path) -> None:
    entries: list[dict[str, Any]] = []
    for result in experiment.estimates:
        entry = result.to_dict()
        if result.placed is not None:
            entry["plan_file"] = result.plan_file
            write_plan(result.placed.plan, out / result.plan_file)
        entries.append(entry)
    scenario = experiment.scenario
    tables = scenario.tables
    fastest = {count: experiment.fastest(count) for count in experiment.counts}
    values = {
        "format_version": FORMAT_VERSION,
        "note": "Times and memory are estimates made without the machines. step_ms_estimate is the "
        "slowest rank's time for the tables, from TorchRec's planner, plus the towers', which the "
        "planner does not count; nothing overlaps and latencies are left out.",
        "tables": {
            "number": len(tables.tables),
            "num_embeddings": tables.num_embeddings,
            "weights_bytes": tables.nbytes,
        },
        "batch_size": scenario.batch_size,
        "sparse_optimizer": scenario.sparse_optimizer,
        "kernels": list(scenario.kernels),
        "cache_load_factor": scenario.cache_load_factor,
        "column_width": scenario.column_width,
        "towers": {"hidden": list(scenario.towers), "dtype": scenario.tower_dtype},
        "hardware": scenario.hardware.to_dict(),
        "not_trainable_with_train": tables.not_trainable,
        "fastest": {str(n): best.strategy if best else None for n, best in fastest.items()},
        "plans": entries,
    }
    (out / "plans.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    write_report(experiment, out)


def _summary(experiment: Experiment, out: Path) -> str:
    lines = [comparison(experiment)]
    noun = experiment.noun
    for (strategy, reason, remedies), counts in experiment.misfits.items():
        where = f"{', '.join(map(str, counts))} {noun}s"
        would = f"; would fit: {', or '.join(remedies)}" if remedies else ""
        lines.append(f"no plan for {strategy} on {where}: {for_command_line(reason + would)}")
    lines.append("All numbers are estimates, made without the machines; * marks the shortest step.")
    obstacle = experiment.scenario.tables.not_trainable
    purpose = "the plans for 'train --plan'"
    if obstacle:
        purpose = f"plans, which 'train' cannot use ({obstacle}); use them in your own pipeline"
    lines.append(f"wrote {out / 'report.html'}, plans.json and {purpose}")
    return "\n".join(lines)
