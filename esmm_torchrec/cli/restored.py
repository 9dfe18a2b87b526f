"""Options of the commands that restore the model of a run on one or several ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from torchrec.distributed.model_parallel import DistributedModelParallel

from esmm_torchrec.choices import check_positive
from esmm_torchrec.runs.restore import restore
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.sharding.planner import ShardingOption
from esmm_torchrec.sharding.process_group import DeviceOption, Ranks


@dataclass(frozen=True, kw_only=True)
class RestoreOptions:
    """Mixin for the options of such a command."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Run folder."""
    batch_size: int = 8192
    """Impressions per rank and step."""
    sharding: ShardingOption = "auto"
    """How tables are placed on the available ranks."""
    step: int | None = None
    """Step of the checkpoint to use; by default, the best one that validation chose, else the
    last."""
    device: DeviceOption = "auto"
    """Device to run on; auto: CUDA if there is a GPU for each rank."""

    def __post_init__(self) -> None:
        check_positive(batch_size=self.batch_size)

    def restore(self, folder: RunFolder, ranks: Ranks, step: int) -> DistributedModelParallel:
        """Restores the model of a step, sharded as in these options; every rank must call it."""
        return restore(folder, ranks, batch_size=self.batch_size, sharding=self.sharding, step=step)
