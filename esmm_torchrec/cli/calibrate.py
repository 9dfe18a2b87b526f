"""`esmm-torchrec calibrate`, which runs on any number of ranks under torchrun."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from esmm_torchrec.cli.restored import RestoreOptions
from esmm_torchrec.cli.terminal import aligned
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.subsets import user_hash
from esmm_torchrec.metrics.calibration import CalibrationKind, fit_calibration
from esmm_torchrec.metrics.report import measure
from esmm_torchrec.metrics.scored import ScoredImpressions
from esmm_torchrec.runs.run_folder import CALIBRATION, RunFolder
from esmm_torchrec.serving.chosen_checkpoint import chosen_step, described
from esmm_torchrec.serving.scorer import score_split
from esmm_torchrec.sharding.process_group import Ranks, process_group

_FIGURES = ("calibration", "ece", "ne")


@dataclass(frozen=True, kw_only=True)
class Options(RestoreOptions):
    """Fit a calibration of a model's probabilities on the test split of a prepared data set.

    The calibration is written to RUN/calibration.json; 'evaluate', 'score' and 'export' apply it
    with --calibrated. Calibrate on data that the model was not trained on, and measure on other
    data.
    """

    data: Path
    """Prepared data set whose test split is used; it must have the same vocabularies as the
    training data."""
    kind: CalibrationKind = "isotonic"
    """Type of calibration; isotonic needs many labels, platt (two parameters per task) few."""


def run(options: Options) -> None:
    """Fits the calibration on the ranks that torchrun started, or on one."""
    with process_group(options.device) as ranks:
        _calibrate(options, ranks)


def _calibrate(options: Options, ranks: Ranks) -> None:
    folder = RunFolder.open(options.run)
    dataset = PreparedDataSet.open(options.data)
    folder.check_data(options.data, dataset.description())
    split = MappedSplit.open(dataset, "test", history_weights=folder.history_weights)
    step = ranks.from_first(lambda: chosen_step(folder, options.step))
    model = options.restore(folder, ranks, step)
    scored = score_split(model, split, ranks, batch_size=options.batch_size)
    if scored is None:
        return
    before = measure(scored)["test"]
    after = _out_of_fold(scored, user_hash(split, "fold") < 0.5, options.kind)
    calibration = fit_calibration(scored, options.kind)
    folder.write_json(
        CALIBRATION,
        calibration.to_dict()
        | {"step": step, "data": str(options.data.resolve()), "impressions": scored.size},
    )
    rows = [["test split", "PCOC", "calibrated", "ECE", "calibrated", "NE", "calibrated"]]
    for name, *_ in scored.tasks.probabilities:
        if name in scored.scores:
            pairs = [(before[f"{name}_{key}"], after.get(f"{name}_{key}")) for key in _FIGURES]
            rows.append([name, *("–" if v is None else f"{v:.4f}" for pair in pairs for v in pair)])
    print("\n".join(aligned(rows)))
    print("calibrated: each half of the users, by curves fitted on the other half")
    print(described(folder, step))
    print(f"{options.kind} calibration: {folder.path / CALIBRATION}")


def _out_of_fold(
    scored: ScoredImpressions, first: np.ndarray, kind: CalibrationKind
) -> Mapping[str, Any]:
    """Measures each half of the users with a calibration fitted on the other half."""
    halves = {part: scored.of(part_rows) for part, part_rows in ((0, first), (1, ~first))}
    calibrated = {
        part: fit_calibration(halves[1 - part], kind).apply(halves[part].scores, scored.tasks)
        for part in halves
    }
    scores = {}
    for name, own in calibrated[0].items():
        values = np.empty(scored.size, own.values.dtype)
        values[first], values[~first] = own.values, calibrated[1][name].values
        scores[name] = replace(own, values=values)
    return measure(replace(scored, scores=scores, true_ctr=None, true_cvr=None))["test"]
