"""`esmm-torchrec report`: describes a run on one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from esmm_torchrec.checkpoints.state import load_model
from esmm_torchrec.choices import check_positive
from esmm_torchrec.data.field_values import field_values, usual_fields
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.errors import RunError
from esmm_torchrec.models.methods import build_train_task
from esmm_torchrec.runs.restore import restore
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.serving.chosen_checkpoint import chosen_step, described
from esmm_torchrec.serving.scorer import score_split
from esmm_torchrec.sharding.process_group import process_group
from esmm_torchrec.training.importance import permutation_importance

MAX_FIELDS = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write one self-contained HTML page about a run."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Run folder."""
    out: Path | None = None
    """File of the page; by default, report.html in the run folder."""
    data: Path | None = None
    """Prepared data set; by default, the data set at the path on which the run was trained."""
    by: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD")] = ()
    """Fields for whose values metrics are shown; by default, the first 8 suitable fields."""
    sample: int = 20_000
    """Number of test impressions on which the importance of features is measured."""
    step: int | None = None
    """Step of the checkpoint to use; by default, the best one that validation chose, else the
    last."""

    def __post_init__(self) -> None:
        check_positive(sample=self.sample)


def run(options: Options) -> None:
    """Scores the test split and writes the page."""
    from esmm_torchrec.training.run_report import run_report  # noqa: PLC0415

    folder = RunFolder.open(options.run)
    out = folder.path / "report.html" if options.out is None else options.out
    if options.out is not None and out.exists():
        raise RunError(f"{out} already exists; remove it or choose another `out`")
    data = folder.config["history"][-1]["data"]["path"] if options.data is None else options.data
    dataset = PreparedDataSet.open(data)
    folder.check_data(data, dataset.description())
    split = MappedSplit.open(dataset, "test", history_weights=folder.history_weights)
    names = options.by or usual_fields(dataset, MAX_FIELDS)
    fields = {name: field_values(dataset, split, name) for name in names}
    step = chosen_step(folder, options.step)
    with process_group("cpu") as ranks:
        model = restore(folder, ranks, batch_size=8192, step=step)
        scored = score_split(model, split, ranks)
    assert scored is not None
    task = build_train_task(folder.schema, folder.model_options, embedding_device="cpu")
    load_model(folder.model_checkpoint(step), task)
    importances = permutation_importance(task.model.eval(), split, sample=options.sample)
    page = run_report(folder, dataset, scored, step=step, fields=fields, importances=importances)
    out.write_text(page)
    print(described(folder, step))
    print(f"report: {out}")
