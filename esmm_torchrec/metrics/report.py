"""What is reported of a model's scores: the parts "test" and "truth" of metrics.json.

Spaces: ctr_* and ctcvr_* are over all impressions, cvr_* over the clicked ones, as in the ESMM
paper. `truth` looks at conversion scores over the entire space as well, clicked or not, which
only data with known probabilities allows.

"test" — against the labels. `<task>` is ctr, cvr or ctcvr; log losses are in nats:

    impressions, clicks, conversions   rows; conversions count clicked impressions only
    <task>_auc                         exact, tie-aware AUC
    <task>_auc_torchrec                TorchRec's own, to compare with: it orders ties by chance and
                                       sums in one piece, so that it is given only for as many
                                       impressions as a window of `metrics.windowed` holds
    ctcvr_auc_common_ctr               AUC of pCTR · pCVR, pCTR from one CTR network common to all
                                       methods: the paper's protocol. With `common_ctr_logit`
    cvr_auc_by_pctr                    reference: pCTR used as the conversion score, on clicks
    cvr_auc_by_pctcvr                  reference: pCTCVR used so
    gauc_<task>                        AUC within groups, averaged by their rows. With `group_id`
    gauc_<task>_coverage               share of the task's rows in groups with both classes
    <task>_log_loss                    mean cross entropy
    <task>_ne                          normalised entropy: log loss over the base rate's entropy
    <task>_calibration                 Σ predicted / Σ label: TorchRec's name for the
    <task>_pcoc                        same number, "predicted over observed" in the literature
    <task>_ece                         expected calibration error, 15 bins of equal mass
    cvr_share_above_one                share of impressions whose pCVR exceeds 1. With `log_pcvr`
    reasons                            {key: one sentence} for each value that is None

"truth" — against the true probabilities, where `true_ctr` and `true_cvr` are known. "soft" means
the true probability as the label, which has no label noise; "excess" means above the log loss of
the true probability, which no model can beat:

    cvr_auc_entire_space               soft AUC of the conversion score over all impressions
    cvr_auc_entire_space_within_ctr_strata
                                       the same within 20 equal-mass strata of the true pCTR, where
                                       leaking pCTR into the conversion score no longer pays
    cvr_log_loss_entire_space, cvr_excess_log_loss_entire_space
    cvr_pcoc_entire_space, cvr_pcoc_clicked, cvr_pcoc_unclicked
                                       Σ pCVR / Σ true pCVR over those impressions
    cvr_ne_entire_space, cvr_ne_clicked, cvr_ne_unclicked
                                       cross entropy of pCVR and the true pCVR over the entropy of
                                       the mean true pCVR of those impressions
    cvr_ece_entire_space, cvr_ece_clicked, cvr_ece_unclicked
                                       expected calibration error against the true pCVR, 15 bins
    ctr_auc_soft, ctr_log_loss_soft, ctr_excess_log_loss
    ctcvr_auc_soft, ctcvr_log_loss_soft, ctcvr_excess_log_loss
    oracle                             what the true probabilities reach: ctr_auc, cvr_auc,
                                       ctcvr_auc (labels), cvr_auc_entire_space,
                                       cvr_auc_entire_space_within_ctr_strata,
                                       cvr_log_loss_entire_space, ctr_auc_soft, ctcvr_auc_soft
    pctr as conversion score           what the true pCTR reaches as a conversion score: cvr_auc,
    pctcvr as conversion score         and the true pCTCVR: cvr_auc_entire_space,
                                       cvr_auc_entire_space_within_ctr_strata
    reasons                            as above
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec.metrics.auc import compute_auc

from esmm_torchrec.errors import OptionError
from esmm_torchrec.metrics.probability import (
    Prediction,
    ctcvr_logit,
    fit,
    log_sigmoid,
    mean_entropy,
    reliability_curve,
)
from esmm_torchrec.metrics.ranking import auc, auc_within_strata, grouped_auc, soft_auc
from esmm_torchrec.metrics.windowed import WINDOW_SIZE

Scores = NDArray[np.floating]
_BLOCK = 1 << 18


@dataclass(frozen=True)
class ScoredImpressions:
    """n impressions with a model's scores and what is known of them; every column (n,), no
    padding, any order.

    A model without a click score (a conversion network alone) or without a conversion score
    leaves the column None; what needs it is reported as None, with the reason.

    Raises:
        OptionError: columns differ in length, a label is neither 0 nor 1, scores are not
            floating, both forms of the conversion score are given, or only one of the true
            probabilities is.
    """

    click: NDArray[np.integer]
    """int8, 0 or 1."""
    conversion: NDArray[np.integer]
    """int8, 0 or 1; read where click is 1, taken for 0 elsewhere."""
    click_logit: Scores | None = None
    """float32, logit of pCTR."""
    conversion_logit: Scores | None = None
    """float32, logit of pCVR."""
    log_pcvr: Scores | None = None
    """float32, log of pCVR, instead of its logit: for a ratio, which may exceed 1."""
    ctcvr_score: Scores | None = None
    """float32, exact logit of pCTCVR; None: computed where both logits are given."""
    common_ctr_logit: Scores | None = None
    """float32, logit of the pCTR of a network common to the methods compared."""
    group_id: NDArray[np.integer] | None = None
    """int64, what gauc_* groups by."""
    true_ctr: Scores | None = None
    """float32, true probability of a click."""
    true_cvr: Scores | None = None
    """float32, true probability of a conversion given a click."""

    def __post_init__(self) -> None:
        size = self.click.shape
        for field in fields(self):
            column = getattr(self, field.name)
            if column is None:
                continue
            if column.ndim != 1 or column.shape != size:
                raise OptionError(f"{field.name} has shape {column.shape} where click has {size}")
            if field.name in ("click", "conversion"):
                if not ((column == 0) | (column == 1)).all():
                    raise OptionError(f"{field.name} must be 0 or 1 for every impression")
            elif field.name != "group_id" and column.dtype not in (np.float32, np.float64):
                raise OptionError(f"{field.name} must be float32, not {column.dtype}")
        if self.conversion_logit is not None and self.log_pcvr is not None:
            raise OptionError("give conversion_logit or log_pcvr, not both")
        if (self.true_ctr is None) != (self.true_cvr is None):
            raise OptionError("give both true_ctr and true_cvr, or neither")

    @cached_property
    def clicked(self) -> NDArray[np.bool_]:
        """bool, which impressions were clicked."""
        return self.click == 1

    @cached_property
    def converted(self) -> NDArray[np.int8]:
        """int8, click · conversion, the label of pCTCVR."""
        return (self.click * self.conversion).astype(np.int8, copy=False)

    @property
    def ctr(self) -> Prediction | None:
        """pCTR of all impressions."""
        return None if self.click_logit is None else Prediction(self.click_logit, "logit")

    @property
    def cvr(self) -> Prediction | None:
        """pCVR of all impressions."""
        if self.log_pcvr is not None:
            return Prediction(self.log_pcvr, "log_probability")
        if self.conversion_logit is not None:
            return Prediction(self.conversion_logit, "logit")
        return None

    @cached_property
    def ctcvr(self) -> Prediction | None:
        """The model's own pCTCVR of all impressions."""
        if self.ctcvr_score is not None:
            return Prediction(self.ctcvr_score, "logit")
        if self.click_logit is not None and self.conversion_logit is not None:
            return Prediction(_product_score(self.click_logit, self), "logit")
        return None

    @cached_property
    def ctcvr_common_ctr(self) -> Prediction | None:
        """pCTCVR from the common network's pCTR and the model's own pCVR."""
        if self.common_ctr_logit is None or self.cvr is None:
            return None
        return Prediction(_product_score(self.common_ctr_logit, self), self.cvr.form)


def measure(scored: ScoredImpressions) -> dict[str, dict[str, Any]]:
    """Everything in the table of this module's docstring.

    Returns:
        {"test": {…}} and, where the true probabilities are known, {"truth": {…}} beside it;
        values are int, float or None (and the dicts named above), ready for JSON.

    Raises:
        OptionError: a true probability is outside [0, 1].
    """
    report = {"test": _measure_against_labels(scored)}
    if scored.true_cvr is not None:
        report["truth"] = _measure_against_truth(scored)
    return report


class _Part:
    """Values under construction; each None comes with its reason."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.reasons: dict[str, str] = {}

    def put(self, key: str, value: float | None, reason: str) -> None:
        if value is not None and not math.isfinite(value):
            value, reason = None, "the figure is not finite"
        self.values[key] = value
        if value is None:
            self.reasons[key] = reason

    def finished(self) -> dict[str, Any]:
        return {**self.values, "reasons": self.reasons}


def _measure_against_labels(scored: ScoredImpressions) -> dict[str, Any]:
    part = _Part()
    clicked, converted = scored.clicked, scored.converted
    part.values["impressions"] = clicked.size
    part.values["clicks"] = int(clicked.sum())
    part.values["conversions"] = int(converted.sum())
    groups = None
    if scored.group_id is not None:
        groups = np.unique(scored.group_id, return_inverse=True)[1]
    groups_of_clicked = None if groups is None else groups[clicked]
    converted_of_clicked = converted[clicked]

    def of_clicked(prediction: Prediction | None) -> Prediction | None:
        return None if prediction is None else prediction[clicked]

    _put_task(part, "ctr", scored.ctr, scored.click, groups)
    _put_task(part, "cvr", of_clicked(scored.cvr), converted_of_clicked, groups_of_clicked)
    _put_task(part, "ctcvr", scored.ctcvr, converted, groups)
    for task, prediction in (("ctr", scored.ctr), ("ctcvr", scored.ctcvr)):
        _put_auc(
            part,
            f"cvr_auc_by_p{task}",
            of_clicked(prediction),
            converted_of_clicked,
            score_of=task,
            label_of="cvr",
        )
    if scored.common_ctr_logit is not None:
        product = scored.ctcvr_common_ctr
        score_of = "cvr" if product is None else "ctcvr"
        key = "ctcvr_auc_common_ctr"
        _put_auc(part, key, product, converted, score_of=score_of, label_of="ctcvr")
    if scored.log_pcvr is not None:
        share = float((scored.log_pcvr > 0).mean()) if clicked.size else None
        part.put("cvr_share_above_one", share, "there is no impression")
    return part.finished()


def _put_task(
    part: _Part,
    task: str,
    prediction: Prediction | None,
    label: NDArray[np.integer],
    groups: NDArray[np.integer] | None,
) -> None:
    _put_auc(part, f"{task}_auc", prediction, label, score_of=task, label_of=task)
    _put_torchrec_auc(part, task, prediction, label)
    flaw = _flaw(task, prediction)
    one_class = _one_class(task, label)
    sums = None if prediction is None or flaw else fit(prediction, label)
    for name, value, reason in (
        ("log_loss", sums and sums.log_loss, one_class),
        ("ne", sums and sums.normalised_entropy, one_class),
        ("calibration", sums and sums.calibration, one_class),
        ("pcoc", sums and sums.calibration, one_class),
    ):
        part.put(f"{task}_{name}", value, flaw or reason)
    ece = None
    if prediction is not None and not flaw:
        ece = reliability_curve(prediction, label).expected_calibration_error
    part.put(f"{task}_ece", ece, flaw or one_class)
    if groups is None:
        return
    value, coverage = None, None
    if prediction is not None and not flaw:
        grouped = grouped_auc(prediction.values, label, groups)
        value, coverage = grouped.auc, grouped.coverage
    reason = flaw or one_class or f"no group has both classes of {_LABEL[task]}"
    part.put(f"gauc_{task}", value, reason)
    part.put(f"gauc_{task}_coverage", coverage, reason)


def _put_auc(
    part: _Part,
    key: str,
    prediction: Prediction | None,
    label: NDArray[np.integer],
    *,
    score_of: str,
    label_of: str,
) -> None:
    flaw = _flaw(score_of, prediction)
    value = None if prediction is None or flaw else auc(prediction.values, label)
    part.put(key, value, flaw or _one_class(label_of, label))


def _put_torchrec_auc(
    part: _Part, task: str, prediction: Prediction | None, label: NDArray[np.integer]
) -> None:
    if label.size > WINDOW_SIZE:
        return
    flaw = _flaw(task, prediction) or _one_class(task, label)
    value = None
    if prediction is not None and not flaw:
        scores = torch.from_numpy(prediction.values.astype(np.float64))[None]
        labels = torch.from_numpy(label.astype(np.float64))[None]
        value = float(compute_auc(1, [scores], [labels], [torch.ones_like(labels)]))
    part.put(f"{task}_auc_torchrec", value, flaw)


_SCORE = {"ctr": "click", "cvr": "conversion", "ctcvr": "click-and-conversion"}
_LABEL = {"ctr": "click", "cvr": "conversion", "ctcvr": "click and conversion"}


def _flaw(task: str, prediction: Prediction | None) -> str:
    """Why a prediction cannot be measured; empty where it can."""
    if prediction is None:
        return f"the model gives no {_SCORE[task]} score"
    broken = prediction.values.size - int(np.isfinite(prediction.values).sum())
    if broken:
        return f"{broken} of {prediction.values.size} {_SCORE[task]} scores are not finite"
    return ""


def _one_class(task: str, label: NDArray[np.integer]) -> str:
    """Why labels allow no comparison; empty where they do."""
    space = "clicked impression" if task == "cvr" else "impression"
    if label.size == 0:
        return f"there is no {space}"
    positives = int(label.sum())
    if positives == 0:
        return f"none of {label.size} {space}s has a {_LABEL[task]}"
    if positives == label.size:
        return f"each of {label.size} {space}s has a {_LABEL[task]}"
    return ""


def _product_score(click_logit: Scores, scored: ScoredImpressions) -> NDArray[np.float32]:
    """What pCTR · pCVR is ranked by, float32 (n,): the exact logit of the product, or its
    log-probability where pCVR is a ratio."""
    score = np.empty(click_logit.size, np.float32)
    # Scores that are not finite stay so, and are reported as such.
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, score.size, _BLOCK):
            rows = slice(start, start + _BLOCK)
            if scored.conversion_logit is not None:
                score[rows] = ctcvr_logit(click_logit[rows], scored.conversion_logit[rows])
            else:
                assert scored.log_pcvr is not None
                score[rows] = log_sigmoid(click_logit[rows]) + scored.log_pcvr[rows]
    return score


def _measure_against_truth(scored: ScoredImpressions) -> dict[str, Any]:
    part = _Part()
    assert scored.true_ctr is not None
    assert scored.true_cvr is not None
    true_ctr, true_cvr = scored.true_ctr, scored.true_cvr
    true_ctcvr = true_ctr.astype(np.float64) * true_cvr
    clicked = scored.clicked
    none = "there is no impression"
    nowhere = none if clicked.size == 0 else "a true probability is 0 or 1 for every impression"

    flaw = _flaw("cvr", scored.cvr)
    cvr = None if flaw else scored.cvr
    whole = cvr and fit(cvr, true_cvr)
    for key, value, reason in (
        ("cvr_auc_entire_space", cvr and soft_auc(cvr.values, true_cvr), nowhere),
        (
            "cvr_auc_entire_space_within_ctr_strata",
            cvr and auc_within_strata(cvr.values, true_cvr, true_ctr),
            nowhere,
        ),
        ("cvr_log_loss_entire_space", whole and whole.log_loss, none),
        ("cvr_excess_log_loss_entire_space", whole and whole.excess_log_loss, none),
    ):
        part.put(key, value, flaw or reason)
    for space, rows, empty in (
        ("entire_space", slice(None), nowhere),
        ("clicked", clicked, "there is no clicked impression"),
        ("unclicked", ~clicked, "there is no unclicked impression"),
    ):
        of_space = cvr and fit(cvr[rows], true_cvr[rows])
        part.put(f"cvr_pcoc_{space}", of_space and of_space.calibration, flaw or empty)
        part.put(f"cvr_ne_{space}", of_space and of_space.normalised_entropy, flaw or empty)
        ece = cvr and reliability_curve(cvr[rows], true_cvr[rows]).expected_calibration_error
        part.put(f"cvr_ece_{space}", ece, flaw or empty)

    for task, prediction, truth in (
        ("ctr", scored.ctr, true_ctr),
        ("ctcvr", scored.ctcvr, true_ctcvr),
    ):
        flaw = _flaw(task, prediction)
        usable = None if flaw else prediction
        sums = usable and fit(usable, truth)
        part.put(f"{task}_auc_soft", usable and soft_auc(usable.values, truth), flaw or nowhere)
        part.put(f"{task}_log_loss_soft", sums and sums.log_loss, flaw or none)
        part.put(f"{task}_excess_log_loss", sums and sums.excess_log_loss, flaw or none)

    report = part.finished()
    reasons = report.pop("reasons")
    report["oracle"] = {
        "ctr_auc": auc(true_ctr, scored.click),
        "ctcvr_auc": auc(true_ctcvr, scored.converted),
        **_as_conversion_score(scored, true_cvr),
        "cvr_log_loss_entire_space": mean_entropy(true_cvr),
        "ctr_auc_soft": soft_auc(true_ctr, true_ctr),
        "ctcvr_auc_soft": soft_auc(true_ctcvr, true_ctcvr),
    }
    report["pctr as conversion score"] = _as_conversion_score(scored, true_ctr)
    report["pctcvr as conversion score"] = _as_conversion_score(scored, true_ctcvr)
    report["reasons"] = reasons
    return report


def _as_conversion_score(scored: ScoredImpressions, score: Scores) -> dict[str, float | None]:
    assert scored.true_ctr is not None
    assert scored.true_cvr is not None
    return {
        "cvr_auc": auc(score[scored.clicked], scored.converted[scored.clicked]),
        "cvr_auc_entire_space": soft_auc(score, scored.true_cvr),
        "cvr_auc_entire_space_within_ctr_strata": auc_within_strata(
            score, scored.true_cvr, scored.true_ctr
        ),
    }
