"""The methods of the ESMM paper, and others, as presets of three parts.

Ma et al., "Entire Space Multi-Task Model", SIGIR 2018, section 3.2 describes the competitors in a
sentence each. If it leaves something open, the docstring of the part states the interpretation.

Methods that train on some of the impressions select rows before batching; nothing is masked inside
a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import torch

from esmm_torchrec.choices import check_choices
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.architectures.aitm import Aitm
from esmm_torchrec.models.architectures.mmoe import Mmoe
from esmm_torchrec.models.architectures.ple import Ple
from esmm_torchrec.models.architectures.separate import Separate
from esmm_torchrec.models.architectures.shared_bottom import SharedBottom
from esmm_torchrec.models.esmm import TrainTask
from esmm_torchrec.models.first_order import FirstOrder
from esmm_torchrec.models.interactions.dcn import Dcn
from esmm_torchrec.models.interactions.deepfm import DeepFm
from esmm_torchrec.models.interactions.none import NoInteraction
from esmm_torchrec.models.objectives.click_space import ClickSpaceObjective
from esmm_torchrec.models.objectives.dcmt import DcmtObjective
from esmm_torchrec.models.objectives.ddpo import DdpoObjective
from esmm_torchrec.models.objectives.delayed import (
    DelayedFeedbackObjective,
    ElapsedTimeObjective,
    FakeNegativeObjective,
)
from esmm_torchrec.models.objectives.division import DivisionObjective
from esmm_torchrec.models.objectives.doubly_robust import DoublyRobustObjective
from esmm_torchrec.models.objectives.esm2 import Esm2Objective
from esmm_torchrec.models.objectives.esmm import EsmmObjective
from esmm_torchrec.models.objectives.ips import IpsObjective
from esmm_torchrec.models.objectives.nise import NiseObjective
from esmm_torchrec.models.objectives.single import ClickObjective, ConversionObjective
from esmm_torchrec.models.parts import (
    AfterInteraction,
    Architecture,
    BaseRates,
    Builder,
    Interaction,
    Objective,
    Rows,
)
from esmm_torchrec.models.registry import Registry, part_from_dict, part_to_dict
from esmm_torchrec.models.rows.clicked import ClickedRows, MissingAsNegativeRows, OversampledRows
from esmm_torchrec.models.rows.delayed import (
    ElapsedTimeRows,
    FakeNegativeRows,
    ObservedRows,
    WaitedRows,
)
from esmm_torchrec.models.rows.everything import AllRows
from esmm_torchrec.models.rows.inverse_propensity import (
    InversePropensityRows,
    RejectionSampledRows,
)
from esmm_torchrec.schema import Schema

DtypeOption = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Method:
    """A preset of three parts."""

    title: str
    """Name in the paper and in reports."""
    summary: str
    """Description for reports, a phrase."""
    rows: Rows
    architecture: Architecture
    objective: Objective
    interaction: Interaction = field(default_factory=NoInteraction)
    """Interaction of the features, before the towers of the architecture."""
    tune: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Option, such as "rows.rate" → values that a comparison tries."""


ROWS: Registry[type[Rows]] = Registry(
    "rows",
    group="esmm_torchrec.rows",
    built_in={
        "all": AllRows,
        "clicked": ClickedRows,
        "missing-as-negative": MissingAsNegativeRows,
        "oversampled": OversampledRows,
        "rejection-sampled": RejectionSampledRows,
        "inverse-propensity": InversePropensityRows,
        "observed": ObservedRows,
        "waited": WaitedRows,
        "fake-negative": FakeNegativeRows,
        "elapsed-time": ElapsedTimeRows,
    },
    of_type=Rows,
)
ARCHITECTURES: Registry[type[Architecture]] = Registry(
    "architecture",
    group="esmm_torchrec.architectures",
    built_in={
        "shared-bottom": SharedBottom,
        "separate": Separate,
        "mmoe": Mmoe,
        "ple": Ple,
        "aitm": Aitm,
    },
    of_type=Architecture,
)
INTERACTIONS: Registry[type[Interaction]] = Registry(
    "interaction",
    group="esmm_torchrec.interactions",
    built_in={"none": NoInteraction, "dcn": Dcn, "deepfm": DeepFm},
    of_type=Interaction,
)
OBJECTIVES: Registry[type[Objective]] = Registry(
    "objective",
    group="esmm_torchrec.objectives",
    built_in={
        "esmm": EsmmObjective,
        "click-space": ClickSpaceObjective,
        "division": DivisionObjective,
        "conversion": ConversionObjective,
        "click": ClickObjective,
        "ips": IpsObjective,
        "doubly-robust": DoublyRobustObjective,
        "dcmt": DcmtObjective,
        "nise": NiseObjective,
        "ddpo": DdpoObjective,
        "esm2": Esm2Objective,
        "dfm": DelayedFeedbackObjective,
        "fnw": FakeNegativeObjective,
        "es-dfm": ElapsedTimeObjective,
    },
    of_type=Objective,
)

PARTS: Mapping[str, Registry[Any]] = {
    "rows": ROWS,
    "architecture": ARCHITECTURES,
    "objective": OBJECTIVES,
    "interaction": INTERACTIONS,
}
"""Part → registry of its implementations."""

_QUANTILES = {"rows.rate": (0.9, 0.5, 0.8, 0.95)}
_CTCVR_WEIGHTS = {"objective.ctcvr_loss_weight": (1.0, 4.0, 16.0, 64.0, 0.25)}
_CONVERSION_WEIGHTS = {"objective.conversion_loss_weight": (0.1, 1.0, 0.01)}

_PAPER = {
    "base": Method(
        "BASE",
        "a conversion network trained on clicked impressions alone",
        ClickedRows(),
        Separate(),
        ConversionObjective(),
    ),
    "aman": Method(
        "AMAN",
        "BASE with sampled unclicked impressions as negatives",
        MissingAsNegativeRows(),
        Separate(),
        ConversionObjective(),
        tune={"rows.rate": (0.1, 0.2, 0.5, 1.0)},
    ),
    "oversampling": Method(
        "OVERSAMPLING",
        "BASE with conversions copied",
        OversampledRows(),
        Separate(),
        ConversionObjective(),
        tune={"rows.rate": (2, 3, 5, 10)},
    ),
    "unbias": Method(
        "UNBIAS",
        "BASE on clicks accepted with probability ∝ 1 / pCTR, clipped at a quantile",
        RejectionSampledRows(),
        Separate(),
        ConversionObjective(),
        tune=_QUANTILES,
    ),
    "unbias-weighted": Method(
        "UNBIAS-weighted",
        "BASE on clicks weighted by 1 / pCTR, clipped at a quantile",
        InversePropensityRows(),
        Separate(),
        ConversionObjective(),
        tune=_QUANTILES,
    ),
    "division": Method(
        "DIVISION",
        "separate CTR and CTCVR networks; pCVR is their quotient",
        AllRows(),
        Separate(),
        DivisionObjective(),
    ),
    "esmm-ns": Method(
        "ESMM-NS",
        "ESMM with separate embeddings for each tower",
        AllRows(),
        Separate(),
        EsmmObjective(),
        tune=_CTCVR_WEIGHTS,
    ),
    "esmm": Method(
        "ESMM",
        "click and conversion towers over shared embeddings, trained through pCTR · pCVR",
        AllRows(),
        SharedBottom(),
        EsmmObjective(),
        tune=_CTCVR_WEIGHTS,
    ),
    "shared-bottom": Method(
        "shared-bottom",
        "ESMM's towers and embeddings, with the conversion loss on clicked impressions",
        AllRows(),
        SharedBottom(),
        ClickSpaceObjective(),
        tune={"objective.conversion_loss_weight": (1.0, 0.25, 0.06, 0.015, 4.0)},
    ),
}
_AFTER = {
    "mtl-ips": Method(
        "MTL-IPS",
        "shared-bottom with clicks weighted by 1 / pCTR",
        AllRows(),
        SharedBottom(),
        IpsObjective(ctcvr_loss_weight=0.0),
        tune=_CONVERSION_WEIGHTS,
    ),
    "mtl-dr": Method(
        "MTL-DR",
        "MTL-IPS with an imputed error over the entire space",
        AllRows(),
        SharedBottom(),
        DoublyRobustObjective(ctcvr_loss_weight=0.0),
        tune=_CONVERSION_WEIGHTS,
    ),
    "mrdr": Method(
        "MRDR",
        "MTL-DR with an imputation of small variance",
        AllRows(),
        SharedBottom(),
        DoublyRobustObjective(ctcvr_loss_weight=0.0, imputation="mrdr"),
        tune=_CONVERSION_WEIGHTS,
    ),
    "escm2-ips": Method(
        "ESCM²-IPS",
        "ESMM with a conversion loss on clicks weighted by 1 / pCTR",
        AllRows(),
        SharedBottom(),
        IpsObjective(),
        tune=_CONVERSION_WEIGHTS,
    ),
    "escm2-dr": Method(
        "ESCM²-DR",
        "ESCM²-IPS with an imputed error over the entire space",
        AllRows(),
        SharedBottom(),
        DoublyRobustObjective(),
        tune=_CONVERSION_WEIGHTS,
    ),
    "dcmt": Method(
        "DCMT",
        "ESMM with weighted clicks and a counterfactual tower for what was not clicked",
        AllRows(),
        SharedBottom(),
        DcmtObjective(),
    ),
    "nise": Method(
        "NISE",
        "shared-bottom with the entropy of pCVR on what was not clicked",
        AllRows(),
        SharedBottom(),
        NiseObjective(),
    ),
    "ddpo": Method(
        "DDPO",
        "ESMM with soft labels from a tower on clicks",
        AllRows(),
        SharedBottom(),
        DdpoObjective(),
    ),
    "mmoe": Method(
        "ESMM-MMoE",
        "ESMM with shared experts below the towers",
        AllRows(),
        Mmoe(),
        EsmmObjective(),
    ),
    "ple": Method(
        "ESMM-PLE",
        "ESMM with experts of each tower and shared ones below",
        AllRows(),
        Ple(),
        EsmmObjective(),
    ),
    "aitm": Method(
        "ESMM-AITM",
        "ESMM with a conversion tower that attends to the click tower",
        AllRows(),
        Aitm(),
        EsmmObjective(),
    ),
}

CLICK_METHOD = "ctr"
"""Name of the method whose network predicts clicks only."""

METHODS: Registry[Method] = Registry(
    "method",
    group="esmm_torchrec.methods",
    built_in={
        **_PAPER,
        **_AFTER,
        CLICK_METHOD: Method(
            "CTR", "a click network alone", AllRows(), Separate(), ClickObjective()
        ),
    },
    of_type=Method,
)
"""Methods by the names of `--method`: first those of the paper's table, in its order, then later
ones and those of other packages. "shared-bottom" is a strong baseline that the paper does not
include; "ctr" supplies pCTR to all methods of a comparison."""

PAPER_METHODS = tuple(_PAPER)
"""Methods of the ESMM paper's table, and the other baselines compared with them here."""

AFTER_METHODS = tuple(_AFTER)
"""Methods published after the ESMM paper."""


class Parts(NamedTuple):
    """Parts of a method, with their options."""

    rows: Rows
    architecture: Architecture
    objective: Objective
    interaction: Interaction

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Returns each part's name and options as plain values for JSON.

        Raises:
            OptionError: a part is not registered.
        """
        return {name: part_to_dict(PARTS[name], getattr(self, name)) for name in self._fields}


def resolve_parts(method: str, given: Mapping[str, Any]) -> Parts:
    """Returns the parts of a method, each replaced by the given part if that is not None.

    Raises:
        OptionError: the method does not exist.
    """
    preset = METHODS[method]
    chosen = {name: given[name] for name in Parts._fields if given.get(name) is not None}
    return Parts(*(getattr(preset, name) for name in Parts._fields))._replace(**chosen)


_SHAPING = ("architecture", "objective", "interaction")
"""Parts that determine the shape of a model and its loss."""


@dataclass(frozen=True)
class ModelOptions:
    """Options that, together with a schema, determine the shape of a model and its loss."""

    method: str = "esmm"
    embedding_dim: int = 16
    tower: tuple[int, ...] = (360, 200, 80)
    dtype: DtypeOption = "float32"
    init_scale: float = 1.0
    architecture: Architecture | None = None
    """Architecture; None: the method's."""
    objective: Objective | None = None
    """Objective; None: the method's."""
    interaction: Interaction | None = None
    """Interaction of the features; None: the method's."""
    first_order: bool = False
    """Whether each logit has a first-order term."""

    def __post_init__(self) -> None:
        check_choices(self)

    @property
    def parts(self) -> Parts:
        """Parts of the method, replaced by those of these options that are not None."""
        return resolve_parts(self.method, vars(self))

    def to_dict(self) -> dict[str, Any]:
        """Returns the options, with resolved parts, as plain values for JSON; `from_dict` is the
        inverse."""
        parts = self.parts.to_dict()
        values = vars(self) | {"tower": list(self.tower)}
        return values | {name: parts[name] for name in _SHAPING}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelOptions:
        """Restores options from the values of `to_dict`.

        Raises:
            OptionError: a part is not installed, or does not have these options.
        """
        METHODS[values["method"]]
        values = {"init_scale": 1.0, "first_order": False, **values}  # absent from older runs
        own: dict[str, Any] = {option.name: values[option.name] for option in fields(cls)}
        own |= {name: part_from_dict(PARTS[name], own[name]) for name in _SHAPING}
        own["tower"] = tuple(own["tower"])
        return cls(**own)


def build_train_task(
    schema: Schema,
    options: ModelOptions,
    *,
    seed: int = 0,
    base_rates: BaseRates | None = None,
    embedding_device: torch.device | str = "meta",
) -> TrainTask:
    """Builds a method's model and its loss; the seed determines the weights of the towers.

    Args:
        schema: tables, features and tasks.
        options: parts and shape of the model.
        seed: seed of the towers' weights, and of the tables' weights unless on "meta".
        base_rates: base rates of the training impressions, which initialise the last biases.
        embedding_device: "meta" leaves drawing the tables to `sharding.shard`.

    Raises:
        OptionError: an option is outside its range, or the objective does not support the chain of
            tasks.
    """
    parts = options.parts
    builder = Builder(
        schema=schema,
        embedding_dim=options.embedding_dim,
        layer_sizes=options.tower,
        dtype=getattr(torch, options.dtype),
        seed=seed,
        base_rates=base_rates,
        embedding_device=embedding_device,
        interaction=parts.interaction,
        init_scale=options.init_scale,
        first_order=options.first_order,
    )
    model = parts.architecture.build(parts.objective.heads(schema.tasks), builder)
    for option, given, part in (
        ("first_order", options.first_order, FirstOrder),
        ("interaction", not isinstance(parts.interaction, NoInteraction), AfterInteraction),
    ):
        if given and not any(isinstance(module, part) for module in model.modules()):
            raise OptionError(
                f"the architecture {type(parts.architecture).__name__} does not use `{option}`; "
                "leave it out, or build the towers with `Builder.over`"
            )
    model = parts.objective.complete(model, schema.tasks)
    return TrainTask(model, parts.objective.bind(schema.tasks))
