"""Summary that a run prints before its first step."""

from __future__ import annotations

from functools import partial

import torch

from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.sharding.plan_text import format_plan, plan_warnings
from esmm_torchrec.training.fit import TrainingPart
from esmm_torchrec.training.loop import TrainingLoop
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.passes import Passes
from esmm_torchrec.training.validation import HeldOut


def announce(
    dataset: PreparedDataSet,
    loop: TrainingLoop,
    options: TrainOptions,
    *,
    part: TrainingPart,
    passes: Passes,
    held_out: HeldOut | None,
) -> None:
    """Prints the plan, the method, the data and the settings of a run that is about to start."""
    say = partial(print, flush=True)
    trainer, ranks, reader, tasks = loop.trainer, loop.ranks, loop.reader, dataset.schema.tasks
    counts, test = dataset.splits["train"], dataset.splits["test"]
    say(format_plan(trainer.plan))
    if options.plan is not None:
        unused = ""
        if options.sharding != "auto":
            unused = f"; the sharding {options.sharding} is not used beside it"
        say(f"placed according to {options.plan}{unused}")
    for warning in plan_warnings(trainer.plan, optimizer=options.sparse_optimizer):
        say(f"warning: {warning}")
    if options.dtype == "bfloat16" and ranks.device.type == "cpu" and not _has_bfloat16():
        say("warning: this processor has no bfloat16 instructions; float32 towers are faster")
    say(
        f"{options.method} on {ranks.world_size} {ranks.device.type} "
        f"{'rank' if ranks.world_size == 1 else 'ranks'}: "
        f"{counts.impressions:,} impressions, "
        f"{', '.join(f'{number:,} {name}s' for name, number in counts.happened.items())} "
        f"to train on, {test.impressions:,} to test on; "
        f"{options.sparse_optimizer} for tables, adam for towers"
    )
    chosen = " (chosen automatically)"
    say(
        f"{reader.global_batch_size:,} impressions per step, {reader.steps_per_epoch:,} steps per "
        f"pass{chosen if options.batch_size == 'auto' else ''}"
    )
    if held_out is not None:
        say(f"{len(held_out.rows):,} impressions are held out ({options.validation})")
    if passes.reason:
        say(f"{passes.reason}{chosen}")
    if options.clip_gradients is not None:
        say(
            f"gradients of the towers are clipped at norm {options.clip_gradients:g}; those of "
            "tables are not"
        )
    learned = {head.label for head in options.parts.objective.heads(tasks)}
    for task in tasks:
        if task.label in learned and not part.base_rates.positives[task.label]:
            say(
                f"warning: there is no {task.name} to train on, so predictions of it are not "
                "meaningful"
            )
    if part.selection is not None:
        notes = "".join(f", {name} {value:,.4g}" for name, value in part.notes.items())
        say(f"{options.method} trains on {part.num_rows:,} of these rows{notes}")


def _has_bfloat16() -> bool:
    """Returns whether the CPU has instructions that multiply bfloat16 matrices."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
