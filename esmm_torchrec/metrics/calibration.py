"""Calibration of a model's scores after training, one curve for each task of the chain.

A curve maps the score of a conditional probability (of a click, of a conversion given a click) to a
probability; joint probabilities are products of calibrated ones. Curves do not decrease: Platt's
keeps every ranking within a task, the isotonic one may map different scores to the same value.
"""

from __future__ import annotations

import importlib
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from esmm_torchrec.choices import check_choices
from esmm_torchrec.errors import DataError, OptionError
from esmm_torchrec.metrics.probability import Prediction, product
from esmm_torchrec.metrics.scored import ScoredImpressions
from esmm_torchrec.tasks import TaskChain

CalibrationKind = Literal["isotonic", "platt"]


@dataclass(frozen=True)
class PlattCurve:
    """Platt's curve, σ(slope · score + intercept)."""

    slope: float
    intercept: float

    def logits(self, scores: Any, xp: Any = np) -> Any:  # noqa: ARG002
        """Returns calibrated logits, float64.

        Args:
            scores: logits or log-probabilities, a float64 array of `xp`.
            xp: numpy or torch.
        """
        return self.slope * scores + self.intercept


@dataclass(frozen=True)
class IsotonicCurve:
    """Isotonic curve: linear between points, constant beyond them."""

    scores: tuple[float, ...]
    """Scores of the points, ascending."""
    probabilities: tuple[float, ...]
    """Probabilities at these scores, in (0, 1): at least half an impression from 0 and 1."""

    def logits(self, scores: Any, xp: Any = np) -> Any:
        """Returns calibrated logits, see `PlattCurve.logits`."""
        if len(self.scores) == 1:
            p = xp.full_like(scores, self.probabilities[0])
        else:
            like = {"dtype": xp.float64, "device": scores.device}
            knots, heights = xp.asarray(self.scores, **like), xp.asarray(self.probabilities, **like)
            inside = xp.clip(scores, self.scores[0], self.scores[-1])
            right = xp.clip(xp.searchsorted(knots, inside), 1, len(self.scores) - 1)
            share = (inside - knots[right - 1]) / (knots[right] - knots[right - 1])
            p = heights[right - 1] + share * (heights[right] - heights[right - 1])
        return xp.log(p) - xp.log1p(-p)


CURVES: Mapping[str, Callable[..., Any]] = {
    "isotonic": IsotonicCurve,
    "platt": PlattCurve,
}


@dataclass(frozen=True)
class Calibration:
    """Calibration curves of a model."""

    kind: CalibrationKind
    curves: Mapping[str, PlattCurve | IsotonicCurve]
    """`Task.rate` ("ctr", "cvr") → its curve."""

    def __post_init__(self) -> None:
        check_choices(self)

    def apply(self, scores: Mapping[str, Prediction], tasks: TaskChain) -> dict[str, Prediction]:
        """Returns calibrated scores by `TaskProbability.name`, as float32 logits.

        Args:
            scores: scores of a model. Those of a task without a curve stay unchanged.
            tasks: the chain.
        """
        calibrated: dict[str, Prediction] = {}
        for task in tasks:
            own = scores.get(task.rate)
            curve = self.curves.get(task.rate)
            if own is not None and curve is not None:
                own = Prediction(
                    curve.logits(own.values.astype(np.float64)).astype(np.float32), "logit"
                )
            if own is not None:
                calibrated[task.rate] = own
            before = tasks.given(task)
            if before is None:
                continue
            joint_before = calibrated.get(before.joint)
            if own is not None and joint_before is not None:
                calibrated[task.joint] = product(joint_before, own)
            elif task.joint in scores:
                calibrated[task.joint] = scores[task.joint]
        return calibrated

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON, with a checksum; `from_dict` is the inverse."""
        curves = {name: asdict(curve) for name, curve in self.curves.items()}
        return {"kind": self.kind, "curves": curves, "crc32": _checksum(self.kind, curves)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """Restores a calibration from the values of `to_dict`.

        Raises:
            ValueError: the checksum does not match the values.
        """
        if _checksum(values["kind"], values["curves"]) != values["crc32"]:
            raise ValueError("the checksum differs")
        curve = CURVES[values["kind"]]
        curves = {
            name: curve(**{k: tuple(v) if isinstance(v, list) else v for k, v in own.items()})
            for name, own in values["curves"].items()
        }
        return cls(values["kind"], curves)


def _checksum(kind: str, curves: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps([kind, curves], sort_keys=True).encode())


def fit_calibration(scored: ScoredImpressions, kind: CalibrationKind) -> Calibration:
    """Fits a curve for each task, over the impressions with the task before it.

    Args:
        scored: impressions that the model was not trained on.
        kind: isotonic (Zadrozny and Elkan, KDD 2002), which needs many labels, or platt, a logistic
            regression on the score (Platt, 1999), which needs few. Both use scikit-learn.

    Raises:
        DataError: a task has only one class.
        OptionError: scikit-learn is not installed.
    """
    try:
        isotonic, linear = (
            importlib.import_module(f"sklearn.{name}") for name in ("isotonic", "linear_model")
        )
    except ModuleNotFoundError:
        raise OptionError(
            "calibration needs scikit-learn, which is not installed; "
            "pip install 'esmm_torchrec[calibration]'"
        ) from None
    curves: dict[str, PlattCurve | IsotonicCurve] = {}
    for task in scored.tasks:
        prediction, given = scored.scores.get(task.rate), scored.tasks.given(task)
        if prediction is None:
            continue
        space = scored.space(task, given)
        label, weights = space.label, space.weights
        if label.all() or not label.any():
            raise DataError(
                f"{task.name} has only one class in the {label.size:,} impressions to calibrate "
                "on; give more of them"
            )
        values = space.of(prediction).values.astype(np.float64)
        if kind == "isotonic":
            margin = 0.5 / label.size
            fitted = isotonic.IsotonicRegression(
                y_min=margin, y_max=1 - margin, out_of_bounds="clip"
            )
            fitted.fit(values, label.astype(np.float64), sample_weight=weights)
            curves[task.rate] = IsotonicCurve(
                tuple(fitted.X_thresholds_.tolist()), tuple(fitted.y_thresholds_.tolist())
            )
        else:
            fitted = linear.LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000)
            fitted.fit(values[:, None], label, sample_weight=weights)
            slope, intercept = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
            if slope < 0:  # the best curve that does not decrease is a constant
                share = np.average(label, weights=weights)
                slope, intercept = 0.0, float(np.log(share) - np.log1p(-share))
            curves[task.rate] = PlattCurve(slope, intercept)
    return Calibration(kind, curves)
