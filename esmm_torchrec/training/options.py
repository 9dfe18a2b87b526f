"""Options of a training run, with their defaults and checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from esmm_torchrec.choices import check_choices
from esmm_torchrec.data.mapped import HistoryWeights
from esmm_torchrec.data.reader import SharedFeatures
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.methods import (
    DtypeOption,
    ModelOptions,
    Parts,
    resolve_parts,
)
from esmm_torchrec.models.parts import Architecture, Interaction, Objective, Rows
from esmm_torchrec.sharding.planner import ShardingOption, SparseOptimizerOption
from esmm_torchrec.sharding.process_group import DeviceOption

NonfiniteOption = Literal["stop", "skip"]

ScheduleOption = Literal["constant", "linear", "cosine"]
"""Learning rates after the warm-up: constant, or falling to 0 at the last step."""

ValidationOption = Literal["hash", "time"]
"""hash: all impressions of users drawn by a hash. time: the latest impressions."""

_POSITIVE = (
    "epochs",
    "batch_size",
    "embedding_dim",
    "shuffle_chunk",
    "init_scale",
    "sparse_lr",
    "dense_lr",
    "keep_checkpoints",
    "lanes",
    "window",
    "clip_gradients",
    "max_steps",
)


@dataclass(frozen=True)
class TrainOptions:
    """Options that determine what a run computes, and how.

    Raises:
        OptionError: a value is out of range.
    """

    method: str = "esmm"
    """Method to train: one of the ESMM paper (esmm, base, aman, oversampling, unbias,
    unbias-weighted, division, esmm-ns), shared-bottom, a method published after the paper (mtl-ips,
    mtl-dr, mrdr, escm2-ips, escm2-dr, dcmt, nise, ddpo, mmoe, ple, aitm), or ctr, the click network
    alone; docs/methods.md describes each. A method is a preset of rows, architecture and
    objective."""
    rows: Rows | None = None
    """Selection of the impressions to train on; None: that of the method."""
    architecture: Architecture | None = None
    """Network that maps features to logits; None: that of the method."""
    objective: Objective | None = None
    """Objective that the logits are trained on; None: that of the method."""
    interaction: Interaction | None = None
    """Interaction that transforms features before the towers; None: that of the method."""
    epochs: int | Literal["auto"] = "auto"
    """Passes over the training split. auto: with a validation share, training continues until the
    held-out part stops improving, and the best checkpoint is the model. Without one, a run takes
    one pass over many rows; on fewer rows, it holds out a fifth of them to find the best number."""
    max_steps: int | None = None
    """Maximum number of steps, regardless of the epochs."""
    batch_size: int | Literal["auto"] = "auto"
    """Impressions per step over all ranks; auto chooses it by the number of impressions that the
    method trains on."""
    validation_share: float = 0.0
    """Share of the training split to hold out and to measure on after each pass."""
    validation: ValidationOption = "hash"
    """Held-out impressions: all impressions of users drawn by a hash, or the latest impressions by
    timestamp."""
    embedding_dim: int = 16
    """Number of columns of every embedding table; a multiple of 4."""
    tower: tuple[int, ...] = (360, 200, 80)
    """Widths of the hidden layers of each tower."""
    first_order: bool = True
    """Add a first-order term to each logit: a weight for each id and each dense feature. It helps
    with rare ids and small data sets; the model of the paper has none."""
    sparse_optimizer: SparseOptimizerOption = "rowwise_adagrad"
    """Optimiser of the embedding tables; fused into the backward pass if TorchRec supports it."""
    sparse_lr: float = 0.05
    """Learning rate of the embedding tables."""
    dense_lr: float = 0.001
    """Learning rate of the towers (Adam)."""
    weight_decay: float = 0.0
    """L2 penalty of the towers: this value times each weight is added to the weight's gradient.
    Tables have no weight decay."""
    lr_schedule: ScheduleOption = "constant"
    """Learning rates after the warm-up: constant, or falling to 0 at the last step."""
    warmup_steps: int = 0
    """Steps over which the learning rates rise linearly."""
    average_weights: Literal["auto", "on", "off"] = "auto"
    """Whether the final weights are an exponential average over the steps instead of the weights of
    the last step. It helps with few rows and needs memory for a copy of the model. auto: on if the
    number of passes is searched."""
    clip_gradients: float | None = None
    """Maximum norm of the gradient of all towers together. Tables are not clipped: a fused
    optimiser applies their gradients before they can be."""
    dtype: DtypeOption = "float32"
    """Data type of the computations in the towers' hidden layers; logits and loss stay float32."""
    init_scale: float = 1.0
    """Factor of the range from which initial embeddings are drawn; at 1, the range is ±1/√rows of
    the table."""
    history_weights: HistoryWeights = "normalised"
    """Weights of multi-valued features: summing to 1 in each bag, or as stored."""
    shared_features: SharedFeatures = "once"
    """Pool shared features once per distinct row of a batch, or expand them for every impression;
    the results are the same."""
    shuffle_chunk: int = 8
    """Maximum number of consecutive impressions of a user that stay together when rows are
    shuffled, so that a batch pools fewer users; 1 shuffles row by row."""
    sharding: ShardingOption = "auto"
    """Sharding type of the tables; auto leaves the choice to TorchRec's planner."""
    plan: Path | None = None
    """Sharding plan, written by 'esmm-torchrec plan' or an earlier run; replaces `sharding`."""
    seed: int = 0
    """Seed of the initial weights and of the order of impressions."""
    device: DeviceOption = "auto"
    """Device to train on; auto: CUDA if there is a GPU for each rank."""
    on_nonfinite: NonfiniteOption = "stop"
    """Action if the loss of a step is not finite: stop the run and save the batch for replay, or
    skip the step, which costs a synchronisation of the ranks in every step."""
    read: Literal["auto", "mapped", "stream"] = "auto"
    """Way of reading the data. mapped: at random from an uncompressed copy of the data set. stream:
    in shuffled windows from the Parquet files on a disk or in a store. auto: mapped if the data set
    is on a disk and its files have less than 40 GiB."""
    lanes: int = 8
    """Number of lanes of streamed data, the parts from which each step takes rows. It must be a
    multiple of the number of ranks and cannot change within a run."""
    window: int = 32_768
    """Number of rows in a window of streamed data: those of a lane that are kept in memory and
    shuffled together."""
    window_cache: Path | None = None
    """Folder for the window files of streamed data; by default, the system's folder for temporary
    files."""
    checkpoint_every: int = 0
    """Number of steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int | None = None
    """Number of latest checkpoints to keep; the best one, if one is marked, is always kept. By
    default, all are kept."""
    table_rows: Mapping[str, int] = field(default_factory=dict)
    """Number of rows, NAME=N, of tables with more rows than the data need. This reserves rows for
    the ids of later days, so that plans and checkpoints keep their shape. A run that starts from
    another run has at least as many rows as that run."""
    start_from: Path | None = None
    """Run whose weights and optimiser state the new run starts with. The vocabularies of the data
    must begin with those of that run."""
    resume: str = "auto"
    """auto: resume the run in the folder if it is the same run; never: accept only an empty folder;
    a number: resume from the checkpoint of that step."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in _POSITIVE:
            value = getattr(self, name)
            if value not in (None, "auto") and not value > 0:
                raise OptionError(f"`{name}` {value} is not positive; give a number above 0")
        for name in ("seed", "weight_decay", "warmup_steps", "checkpoint_every"):
            value = getattr(self, name)
            if value < 0:
                raise OptionError(f"`{name}` {value} is negative; give 0 or more")
        if not self.tower or min(self.tower) < 1:
            raise OptionError("`tower` needs the widths of the hidden layers, such as 360 200 80")
        if not 0 <= self.validation_share < 1:
            raise OptionError(
                f"`validation_share` {self.validation_share} is not a share; give a number of at "
                "least 0 and below 1"
            )
        if self.lr_schedule != "constant" and self.epochs == "auto":
            raise OptionError(
                f"`lr_schedule` {self.lr_schedule} depends on the last step, which `epochs` auto "
                "does not know; set `epochs` to a number"
            )
        if self.average_weights == "on" and self.epochs == "auto" and self.validation_share:
            raise OptionError(
                "`average_weights` on cannot be combined with early stopping, whose best "
                "checkpoint has the weights of a step; set `epochs` to a number, or leave out "
                "`validation_share`"
            )
        _ = self.parts
        if self.resume not in ("auto", "never") and not (
            self.resume.isascii() and self.resume.isdigit()
        ):
            raise OptionError(f"`resume` {self.resume} is not auto, never or the number of a step")

    @property
    def model(self) -> ModelOptions:
        """Options that determine the shape of the model."""
        shape = {field.name: getattr(self, field.name) for field in fields(ModelOptions)}
        parts = self.parts._asdict()
        del parts["rows"]
        return ModelOptions(**shape | parts)

    @property
    def parts(self) -> Parts:
        """Parts of the method, replaced by those that the options set."""
        return resolve_parts(self.method, vars(self))

    def to_dict(self) -> dict[str, Any]:
        """Returns the options as JSON values, with the parts resolved."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values = {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}
        return values | {
            **self.model.to_dict(),
            **self.parts.to_dict(),
            "table_rows": [f"{name}={rows}" for name, rows in sorted(self.table_rows.items())],
        }
