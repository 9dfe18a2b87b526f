"""Human-readable plans: tables, comparisons and warnings."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from esmm_torchrec.sharding.plan_file import PlanFile
from esmm_torchrec.sharding.table_placement import DATA_TYPES, TablePlacement


def plan_warnings(plan: PlanFile, *, optimizer: str) -> list[str]:
    """Returns a sentence for each table that trains differently from training on one rank.

    Args:
        optimizer: optimiser of the tables, a value of `--sparse-optimizer`.
    """
    if optimizer != "rowwise_adagrad":
        return []
    return [
        f"table {name!r} is cut into columns ({table.sharding_type}) and rowwise_adagrad keeps one "
        "momentum per row and shard, so it trains differently from an uncut table; this is by "
        "design, and adagrad or table_wise avoid it"
        for name, table in plan.tables.items()
        if any(shard.offset[1] for shard in table.shards)
    ]


def format_plan(plan: PlanFile) -> str:
    """Formats a plan as text: a line per table, then a line with the weights per rank."""
    lines = [("table", "rows", "dim", "MB", "sharding", "kernel", "ranks")]
    held = [0] * plan.world_size
    for name, table in plan.tables.items():
        lines.append(
            (
                name,
                f"{table.num_embeddings:,}",
                str(table.embedding_dim),
                f"{table.nbytes / 1e6:,.1f}",
                table.sharding_type,
                table.compute_kernel,
                format_ranks(table.ranks),
            )
        )
        for shard in table.shards:
            held[shard.rank] += shard.size[0] * shard.size[1] * DATA_TYPES[table.data_type][1]
    text = [aligned(lines, right=(1, 2, 3))]
    ranks = f"{plan.world_size} ranks" if plan.world_size > 1 else "1 rank"
    text.append(
        f"{len(plan.tables)} tables on {ranks} ({plan.device}); weights per rank: "
        f"{min(held) / 1e6:,.1f} to {max(held) / 1e6:,.1f} MB"
    )
    return "\n".join(text)


def aligned(lines: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """Formats rows of cells as text with aligned columns.

    Args:
        lines: rows with one cell per column.
        right: indices of the right-aligned columns.
    """
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def format_ranks(ranks: Sequence[int]) -> str:
    """Formats ranks, consecutive ones as a range: 0-7, 3 or 0,4,2."""
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[0] + len(ranks))):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks))


def compare_plans(first: PlanFile, second: PlanFile) -> str:
    """Returns the differences of two plans, one per line, or a line that says there are none."""
    lines = [
        f"{what}: {getattr(first, what)} -> {getattr(second, what)}"
        for what in ("world_size", "local_world_size", "device")
        if getattr(first, what) != getattr(second, what)
    ]
    for name in first.tables:
        if name not in second.tables:
            lines.append(f"table {name!r}: only in the first")
    for name, after in second.tables.items():
        before = first.tables.get(name)
        if before is None:
            lines.append(f"table {name!r}: only in the second")
        elif before != after:
            lines.append(f"table {name!r}: {_describe(before, after)}")
    return "\n".join(lines) or "the plans are the same"


def _describe(before: TablePlacement, after: TablePlacement) -> str:
    changes = []
    if (before.num_embeddings, before.embedding_dim) != (after.num_embeddings, after.embedding_dim):
        changes.append(
            f"{before.num_embeddings:,} x {before.embedding_dim} -> "
            f"{after.num_embeddings:,} x {after.embedding_dim}"
        )
    for what in ("data_type", "sharding_type", "compute_kernel", "cache_load_factor"):
        old, new = getattr(before, what), getattr(after, what)
        if old != new:
            name = f"{what} " if what == "cache_load_factor" else ""
            changes.append(f"{name}{old} -> {new}")
    if before.ranks != after.ranks:
        changes.append(f"ranks {format_ranks(before.ranks)} -> {format_ranks(after.ranks)}")
    return ", ".join(changes) or "cut at other columns"
