"""Report on a model's scores: the parts "test" and "truth" of metrics.json.

Spaces: ctr_* and ctcvr_* are over all impressions, cvr_* over the clicked ones, as in the ESMM
paper. In a longer chain, the rate of each task is over the impressions with the task before it, and
each joint probability over all impressions. "truth" measures conversion scores over the entire
space as well, clicked or not, which requires data with known probabilities.

If impressions have weights, all figures except the counts are weighted.

"test": against the labels. `<task>` is a name of `TaskChain.probabilities`, by default ctr, cvr or
ctcvr; log losses are in nats:

    impressions, clicks, conversions   numbers of rows, one for each task; conversions count clicked
                                       impressions only
    sum_of_weights                     of all impressions, if they have weights
    <task>_auc                         exact, tie-aware AUC
    <task>_auc_torchrec                TorchRec's AUC, for comparison: it orders ties arbitrarily
                                       and computes all rows at once, so it is reported only if the
                                       impressions fit in a window of `metrics.windowed`
    ctcvr_auc_common_ctr               AUC of pCTR · pCVR, pCTR from one CTR network common to all
                                       methods: the paper's protocol. With `common_ctr_logit`
    cvr_auc_by_pctr                    reference: pCTR used as the conversion score, on clicks
    cvr_auc_by_pctcvr                  reference: pCTCVR used as the conversion score
                                       In a longer chain, <task>_auc_by_<score> of each task
    gauc_<task>                        AUC within groups, averaged by their rows. With `group_id`
    gauc_<task>_coverage               share of the task's rows in groups with both classes
    <task>_log_loss                    mean cross entropy
    <task>_ne                          normalised entropy: log loss over the base rate's entropy
    <task>_calibration                 Σ predicted / Σ label: TorchRec's name for the
    <task>_pcoc                        same number, "predicted over observed" in the literature
    <task>_ece                         expected calibration error, 15 bins of equal mass
    <task>_base_rate                   share of the task's impressions with the label
    <task>_mean_entire_space           mean predicted probability over all impressions, of a task
                                       that is given another. ESMM's pCVR is known to be too high
                                       there; compare cvr_base_rate, the conversion rate of clicks
    ips_effective_sample_size          (Σw)² / Σw² of the clicks for w = 1 / pCTR, clipped at its
    ips_effective_sample_share         .9 quantile over them, and as a share of the clicks: the
                                       part that remains after weighting by inverse propensities
    <task>_share_above_one             share of impressions whose probability exceeds 1, if it is a
                                       quotient
    reasons                            {key: one sentence} for each value that is None

With `relative_improvements` also <task>_relaimpr, (AUC − .5) / (AUC of another model − .5) − 1.

"truth": against the true probabilities of the default chain, if `true_ctr` and `true_cvr` are
known. "soft" means the true probability as the label, which has no label noise; "excess" means
above the log loss of the true probability, which no model can beat:

    cvr_auc_entire_space               soft AUC of the conversion score over all impressions
    cvr_auc_entire_space_within_ctr_strata
                                       the same within 20 equal-mass strata of the true pCTR,
                                       within which pCTR is of no use as a conversion score
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
    oracle                             figures of the true probabilities: ctr_auc, cvr_auc,
                                       ctcvr_auc (labels), cvr_auc_entire_space,
                                       cvr_auc_entire_space_within_ctr_strata,
                                       cvr_log_loss_entire_space, ctr_auc_soft, ctcvr_auc_soft
    pctr as conversion score           figures of the true pCTR and of the true pCTCVR, each used
    pctcvr as conversion score         as a conversion score: cvr_auc, cvr_auc_entire_space,
                                       cvr_auc_entire_space_within_ctr_strata
    reasons                            as above
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torchrec.metrics.auc import compute_auc

from esmm_torchrec.metrics.probability import (
    Prediction,
    ProbabilityFit,
    fit,
    mean_entropy,
    reliability_curve,
)
from esmm_torchrec.metrics.ranking import auc, auc_within_strata, grouped_auc, soft_auc
from esmm_torchrec.metrics.scored import ScoredImpressions, Scores, Space
from esmm_torchrec.metrics.windowed import WINDOW_SIZE
from esmm_torchrec.tasks import DEFAULT_TASKS

PROPENSITY_QUANTILE = 0.1
"""Quantile of pCTR over the clicks at which `ips_effective_sample_size` clips propensities."""


def measure(scored: ScoredImpressions) -> dict[str, dict[str, Any]]:
    """Computes all figures in the table of this module's docstring.

    Returns:
        {"test": {…}} and, if the true probabilities are known, {"truth": {…}}; values are int,
        float or None (and the dicts named above), ready for JSON.

    Raises:
        OptionError: a true probability is outside [0, 1], or a weight is negative or not finite.
    """
    report = {"test": _measure_against_labels(scored)}
    if scored.true_cvr is not None and scored.tasks == DEFAULT_TASKS:
        report["truth"] = _measure_against_truth(scored)
    return report


class Part:
    """Values of a part of the report; each None has a reason."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.reasons: dict[str, str] = {}

    def put(self, key: str, value: float | None, reason: str) -> None:
        """Adds a value, and the reason if it is None. A value that is not finite becomes None."""
        if value is not None and not math.isfinite(value):
            value, reason = None, "the figure is not finite"
        self.values[key] = value
        if value is None:
            self.reasons[key] = reason

    def finished(self) -> dict[str, Any]:
        """Returns the values by key, and "reasons"."""
        return {**self.values, "reasons": self.reasons}


_NOTHING_WEIGHS = "there are no impressions of a weight above 0"


def row_counts(scored: ScoredImpressions) -> dict[str, Any]:
    """Counts the impressions and those with each task, and sums the weights."""
    values: dict[str, Any] = {"impressions": scored.size}
    values |= {f"{task.name}s": int(scored.happened(task.name).sum()) for task in scored.tasks}
    if scored.weight is not None:
        values["sum_of_weights"] = float(scored.weight.sum(dtype=np.float64))
    return values


def _measure_against_labels(scored: ScoredImpressions) -> dict[str, Any]:
    part = Part()
    part.values |= row_counts(scored)
    for name, _, task, given in scored.tasks.probabilities:
        _put_task(part, name, scored, scored.space(task, given))
    for task, given in scored.tasks.links:
        space = scored.space(task, given)
        rate, flaw = _usable(task.rate, scored.scores.get(task.rate))
        mean = rate and _mean(rate.probability.astype(np.float64), scored)
        part.put(f"{task.rate}_mean_entire_space", mean, flaw or _NOTHING_WEIGHS)
        for name, column in ((given.joint, given.joint_score), (task.joint, task.joint_score)):
            key = f"{task.rate}_auc_by_{column}"
            _put_auc(part, key, *_usable(name, space.of(scored.scores.get(name))), space)
    _put_effective_sample_size(part, scored)
    if scored.common_ctr_logit is not None:
        product = scored.ctcvr_common_ctr
        name = "cvr" if product is None else "ctcvr"
        space = scored.space(scored.tasks.task("conversion"), None)
        _put_auc(part, "ctcvr_auc_common_ctr", *_usable(name, product), space)
    for name, score in scored.scores.items():
        if score.form == "log_probability":
            share = _mean((score.values > 0).astype(np.float64), scored)
            part.put(f"{name}_share_above_one", share, _NOTHING_WEIGHS)
    return part.finished()


def _mean(values: np.ndarray, scored: ScoredImpressions) -> float | None:
    """Returns the weighted mean, or None if no impression has a weight above 0."""
    weighs = scored.size and (scored.weight is None or scored.weight.any())
    return float(np.average(values, weights=scored.weight)) if weighs else None


def _put_effective_sample_size(part: Part, scored: ScoredImpressions) -> None:
    """Adds the effective sample size of the clicks weighted by 1 / pCTR."""
    first = scored.tasks[0]
    prediction, flaw = _usable(first.rate, scored.scores.get(first.rate))
    size = share = None
    clicked = scored.happened(first.name)
    if prediction is not None and clicked.any():
        pctr = prediction[clicked].block(slice(None)).probability
        weights = 1 / np.maximum(pctr, np.quantile(pctr, PROPENSITY_QUANTILE, method="lower"))
        if scored.weight is not None:
            weights = weights * scored.weight[clicked]
        size = float(weights.sum() ** 2 / (weights**2).sum()) if weights.any() else 0.0
        share = size / len(pctr)
    reason = flaw or f"there is no {first.name}"
    part.put("ips_effective_sample_size", size, reason)
    part.put("ips_effective_sample_share", share, reason)


def relative_improvements(
    test: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, float | None]:
    """Computes the RelaImpr of each AUC over another model's: (AUC − .5) / (other AUC − .5) − 1
    (Yan et al., "Coupled Group Lasso for Web-Scale CTR Prediction", ICML 2014); None if the other
    model ranks no better than chance.

    Args:
        test: part "test" of `measure`.
        other: part "test" of the other model, on the same impressions.
    """
    found: dict[str, float | None] = {}
    for key, value in test.items():
        base = other.get(key)
        if key.endswith("_auc") and value is not None and base is not None:
            name = f"{key.removesuffix('_auc')}_relaimpr"
            found[name] = (value - 0.5) / (base - 0.5) - 1 if base > 0.5 else None
    return found


def _put_task(part: Part, name: str, scored: ScoredImpressions, space: Space) -> None:
    label, weights = space.label, space.weights
    prediction, flaw = _usable(name, space.of(scored.scores.get(name)))
    reason = flaw or space.one_class
    _put_auc(part, f"{name}_auc", prediction, flaw, space)
    if label.size <= WINDOW_SIZE:
        value = None
        if prediction is not None and not reason:
            value = _torchrec_auc(prediction, label, weights)
        part.put(f"{name}_auc_torchrec", value, reason)
    put_fit(part, name, prediction and fit(prediction, label, weights), reason)
    curve = prediction and reliability_curve(prediction, label, weights)
    part.put(f"{name}_ece", curve and curve.expected_calibration_error, reason)
    size = label.size if weights is None else float(weights.sum())
    rate = float(np.average(label, weights=weights)) if size else None
    part.put(f"{name}_base_rate", rate, space.one_class)
    if scored.groups is None:
        return
    groups = space.of(scored.groups)
    grouped = prediction and grouped_auc(prediction.values, label, groups, weights)
    reason = reason or "no group has both classes"
    part.put(f"gauc_{name}", grouped and grouped.auc, reason)
    part.put(f"gauc_{name}_coverage", grouped and grouped.coverage, reason)


def put_fit(part: Part, name: str, sums: ProbabilityFit | None, reason: str) -> None:
    """Adds the figures of a probability that its sums determine."""
    part.put(f"{name}_log_loss", sums and sums.log_loss, reason)
    part.put(f"{name}_ne", sums and sums.normalised_entropy, reason)
    part.put(f"{name}_calibration", sums and sums.calibration, reason)
    part.put(f"{name}_pcoc", sums and sums.calibration, reason)


def _put_auc(part: Part, key: str, prediction: Prediction | None, flaw: str, space: Space) -> None:
    value = prediction and auc(prediction.values, space.label, space.weights)
    part.put(key, value, flaw or space.one_class)


def _torchrec_auc(prediction: Prediction, label: np.ndarray, weights: np.ndarray | None) -> float:
    columns = (prediction.values, label, np.ones(len(label)) if weights is None else weights)
    own, happened, mass = (torch.from_numpy(c.astype(np.float64))[None] for c in columns)
    return float(compute_auc(1, [own], [happened], [mass]))


def _usable(name: str, prediction: Prediction | None) -> tuple[Prediction | None, str]:
    """Returns the prediction if it can be measured, else None and the reason."""
    if prediction is None:
        return None, f"the model gives no {name} score"
    broken = prediction.values.size - int(np.isfinite(prediction.values).sum())
    if broken:
        return None, f"{broken} of {prediction.values.size} {name} scores are not finite"
    return prediction, ""


def _measure_against_truth(scored: ScoredImpressions) -> dict[str, Any]:
    part = Part()
    assert scored.true_ctr is not None
    assert scored.true_cvr is not None
    true_ctr, true_cvr, weights = scored.true_ctr, scored.true_cvr, scored.weight
    true_ctcvr = true_ctr.astype(np.float64) * true_cvr
    clicked = scored.happened("click")
    none = "there are no impressions"
    nowhere = none if clicked.size == 0 else "a true probability is 0 or 1 for every impression"

    cvr, flaw = _usable("cvr", scored.scores.get("cvr"))
    whole = cvr and fit(cvr, true_cvr, weights)
    for key, value, reason in (
        ("cvr_auc_entire_space", cvr and soft_auc(cvr.values, true_cvr, weights), nowhere),
        (
            "cvr_auc_entire_space_within_ctr_strata",
            cvr and auc_within_strata(cvr.values, true_cvr, true_ctr, weights),
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
        own = None if weights is None else weights[rows]
        of_space = cvr and fit(cvr[rows], true_cvr[rows], own)
        part.put(f"cvr_pcoc_{space}", of_space and of_space.calibration, flaw or empty)
        part.put(f"cvr_ne_{space}", of_space and of_space.normalised_entropy, flaw or empty)
        curve = cvr and reliability_curve(cvr[rows], true_cvr[rows], own)
        part.put(f"cvr_ece_{space}", curve and curve.expected_calibration_error, flaw or empty)

    for task, truth in (("ctr", true_ctr), ("ctcvr", true_ctcvr)):
        usable, flaw = _usable(task, scored.scores.get(task))
        sums = usable and fit(usable, truth, weights)
        soft = usable and soft_auc(usable.values, truth, weights)
        part.put(f"{task}_auc_soft", soft, flaw or nowhere)
        part.put(f"{task}_log_loss_soft", sums and sums.log_loss, flaw or none)
        part.put(f"{task}_excess_log_loss", sums and sums.excess_log_loss, flaw or none)

    report = part.finished()
    reasons = report.pop("reasons")
    report["oracle"] = {
        "ctr_auc": auc(true_ctr, clicked, weights),
        "ctcvr_auc": auc(true_ctcvr, scored.happened("conversion"), weights),
        **_as_conversion_score(scored, true_cvr),
        "cvr_log_loss_entire_space": mean_entropy(true_cvr, weights),
        "ctr_auc_soft": soft_auc(true_ctr, true_ctr, weights),
        "ctcvr_auc_soft": soft_auc(true_ctcvr, true_ctcvr, weights),
    }
    report["pctr as conversion score"] = _as_conversion_score(scored, true_ctr)
    report["pctcvr as conversion score"] = _as_conversion_score(scored, true_ctcvr)
    report["reasons"] = reasons
    return report


def _as_conversion_score(scored: ScoredImpressions, score: Scores) -> dict[str, float | None]:
    assert scored.true_ctr is not None
    assert scored.true_cvr is not None
    space = scored.space(scored.tasks.task("conversion"), scored.tasks.task("click"))
    return {
        "cvr_auc": auc(score[space.rows], space.label, space.weights),
        "cvr_auc_entire_space": soft_auc(score, scored.true_cvr, scored.weight),
        "cvr_auc_entire_space_within_ctr_strata": auc_within_strata(
            score, scored.true_cvr, scored.true_ctr, scored.weight
        ),
    }
