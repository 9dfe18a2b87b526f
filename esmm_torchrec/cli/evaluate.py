"""`esmm-torchrec evaluate`, which runs on any number of ranks under torchrun."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from esmm_torchrec.cli.restored import RestoreOptions
from esmm_torchrec.cli.terminal import format_metrics, format_slices
from esmm_torchrec.data.field_values import field_values
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.stream import StreamedSplit, open_in_order
from esmm_torchrec.errors import OptionError, RunError
from esmm_torchrec.metrics.in_parts import measure_in_parts
from esmm_torchrec.metrics.report import measure, relative_improvements
from esmm_torchrec.metrics.slices import measure_slices
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.serving.chosen_checkpoint import chosen_step, described, is_finished
from esmm_torchrec.serving.scorer import is_in_parts, score_split
from esmm_torchrec.sharding.process_group import Ranks, process_group


@dataclass(frozen=True, kw_only=True)
class Options(RestoreOptions):
    """Measure a trained model on a split of a prepared data set."""

    data: str
    """Prepared data set (a folder or its URI) with the same vocabularies as the training data."""
    split: Literal["train", "test"] = "test"
    """Split to measure on."""
    calibrated: bool = False
    """Measure the probabilities as calibrated by 'calibrate'."""
    by: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD")] = ()
    """Also show calibration for each value of these fields: single-valued id features, or dense
    features divided into tenths. The table shows the values that deviate most; --json writes all
    of them."""
    against: Path | None = None
    """metrics.json of another run, or a file written by --json, for the same impressions; adds the
    RelaImpr of each AUC over the AUC in that file."""
    json: Path | None = None
    """File to which the figures are also written; figures based on labels are under the name of
    the split."""


def run(options: Options) -> None:
    """Evaluates on the ranks that torchrun started, or on one."""
    with process_group(options.device) as ranks:
        _evaluate(options, ranks)


def _evaluate(options: Options, ranks: Ranks) -> None:
    folder = RunFolder.open(options.run)
    dataset = PreparedDataSet.open(options.data)
    folder.check_data(options.data, dataset.description())
    split = open_in_order(
        dataset,
        options.split,
        ranks=ranks.world_size,
        history_weights=folder.history_weights,
    )
    other = None if options.against is None else _read(options.against, options)
    fields = {}
    if options.by:
        if isinstance(split, StreamedSplit):
            raise OptionError("`by` needs a data set on a disk; copy it there, or leave it out")
        fields = {field: field_values(dataset, split, field) for field in options.by}
    step = ranks.from_first(lambda: chosen_step(folder, options.step))
    calibration = folder.calibration(step) if options.calibrated else None
    model = options.restore(folder, ranks, step)
    scored = score_split(model, split, ranks, batch_size=options.batch_size)
    if scored is None:
        return
    if calibration is not None:
        scored = replace(scored, scores=calibration.apply(scored.scores, scored.tasks))
    metrics = measure_in_parts(scored) if is_in_parts(split) else measure(scored)
    if not ranks.is_first:
        return
    if other is not None:
        metrics["test"] |= relative_improvements(metrics["test"], other)
    print(format_metrics(metrics, scored.tasks).replace("test split", f"{options.split} split", 1))
    print(described(folder, step))
    slices = {}
    for field, values in fields.items():
        slices[field] = measure_slices(scored, values.codes, values.names)
        print(f"\n{format_slices(field, slices[field])}")
    if options.json is not None:
        figures = {
            "run": str(options.run),
            "step": step,
            "finished": is_finished(folder),
            "data": str(options.data),
            "split": options.split,
            options.split: metrics.pop("test"),
        } | metrics
        if slices:
            figures["by"] = slices
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def _read(path: Path, options: Options) -> dict[str, Any]:
    """Reads the figures of another model for the same split.

    Raises:
        RunError: the file cannot be read, or has no figures for the split.
    """
    try:
        return json.loads(path.read_text())[options.split]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(
            f"{path} has no figures for the {options.split} split; give the metrics.json of a "
            "run, or a file written by 'evaluate --json'"
        ) from None
