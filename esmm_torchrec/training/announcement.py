"""What a run prints before its first step."""

from __future__ import annotations

import torch

from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.sharding.plan_text import format_plan, plan_warnings
from esmm_torchrec.training.loop import TrainingLoop
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.passes import Passes
from esmm_torchrec.training.validation import HeldOut


def announce(
    dataset: PreparedDataSet,
    loop: TrainingLoop,
    options: TrainOptions,
    *,
    passes: Passes,
    held_out: HeldOut | None,
) -> None:
    """Prints what is about to be trained, and where."""
    trainer, ranks, reader = loop.trainer, loop.ranks, loop.reader
    counts, test = dataset.splits["train"], dataset.splits["test"]
    print(format_plan(trainer.plan))
    if options.plan is not None:
        unused = ""
        if options.sharding != "auto":
            unused = f"; the sharding {options.sharding} is not used beside it"
        print(f"placed according to {options.plan}{unused}")
    for warning in plan_warnings(trainer.plan, optimizer=options.sparse_optimizer):
        print(f"warning: {warning}")
    if options.dtype == "bfloat16" and ranks.device.type == "cpu" and not _has_bfloat16():
        print("warning: this processor has no bfloat16 instructions; float32 towers are faster")
    print(
        f"{options.method} on {ranks.world_size} {ranks.device.type} "
        f"{'rank' if ranks.world_size == 1 else 'ranks'}: "
        f"{counts.impressions:,} impressions, "
        f"{', '.join(f'{number:,} {name}s' for name, number in counts.happened.items())} "
        f"to train on, {test.impressions:,} to test on; "
        f"{options.sparse_optimizer} for tables, adam for towers"
    )
    size = f"{reader.global_batch_size:,} impressions per step"
    print(
        f"{size}, {reader.steps_per_epoch:,} steps per pass"
        + (" (chosen automatically)" if options.batch_size == "auto" else ""),
        flush=True,
    )
    if held_out is not None:
        print(
            f"{len(held_out.rows):,} impressions are held out ({options.validation})",
            flush=True,
        )
    if passes.reason:
        print(f"{passes.reason} (chosen automatically)", flush=True)
    if options.clip_gradients is not None:
        print(
            f"gradients of the towers are clipped at norm {options.clip_gradients:g}; those of "
            "tables are not",
            flush=True,
        )


def _has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices itself."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
