"""`esmm-torchrec score`: also under torchrun, on any number of ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from esmm_torchrec.choices import check_positive
from esmm_torchrec.cli.terminal import aligned
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.sources.raw_tables import BadRows, files_of
from esmm_torchrec.data.storage import is_uri, staged
from esmm_torchrec.data.stream import StreamedSplit, stream_in_order
from esmm_torchrec.errors import OptionError
from esmm_torchrec.metrics.calibration import Calibration
from esmm_torchrec.runs.restore import restore
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.serving.chosen_checkpoint import chosen_step, described, identity
from esmm_torchrec.serving.package import PREPROCESSING, Package
from esmm_torchrec.serving.predictor import Predictor
from esmm_torchrec.serving.score_files import (
    ScoreFolder,
    is_folder,
    refuse_existing,
    write_scores,
)
from esmm_torchrec.serving.scored_rows import Written, unknown_warnings
from esmm_torchrec.serving.scoring import check_preprocessing, encode_rows, remove, score
from esmm_torchrec.serving.streamed_scores import score_streamed
from esmm_torchrec.sharding.planner import ShardingOption
from esmm_torchrec.sharding.process_group import DeviceOption, Ranks, process_group


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the sample_id, pctr, pcvr and pctcvr of every impression, in order.

    With a folder as --out, each file of --input is scored to its own output file, and an
    interrupted command resumes from where it stopped. If --data is scored to a folder, which may be
    a URI, each rank reads one contiguous part of the data set and writes a file of scores;
    scores.json lists these files in order.
    """

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """The run folder, or a package that 'export' wrote."""
    out: str
    """The file to write, which ends in .parquet, .csv or .arrow, or a folder; or its URI."""
    data: str | None = None
    """A prepared data set whose vocabularies are those of the training; a folder or its URI."""
    input: tuple[str, ...] = ()
    """Instead of --data: Parquet, Arrow or text files with raw ids, with the column names of the
    data that was prepared; also folders and patterns of files, and URIs of Parquet files. Labels
    are not needed."""
    keep: tuple[str, ...] = ()
    """Columns of --input to write in addition to the scores."""
    max_bad_rows: int = 0
    """Number of rows of --input that may be impossible to score; their scores are null."""
    split: Literal["train", "test"] = "test"
    """Split of --data to score."""
    batch_size: int = 8192
    """Impressions per rank and step."""
    sharding: ShardingOption = "auto"
    """How tables are placed on the available ranks."""
    step: int | None = None
    """Step of the checkpoint to use; by default, the best one that validation chose, else the
    last."""
    device: DeviceOption = "auto"
    """auto: CUDA if there is a GPU for each rank."""
    calibrated: bool = False
    """Write the probabilities as calibrated by 'calibrate'. For a package, this is fixed at
    export."""

    def __post_init__(self) -> None:
        check_positive(batch_size=self.batch_size)
        for name in self.keep:
            if self.keep.count(name) > 1:
                raise OptionError(f"`keep` names {name!r} twice; name it once")
        if (self.data is None) == (not self.input):
            raise OptionError("give what to score, as either `data` or `input`")
        if self.data is not None and (self.keep or self.max_bad_rows):
            raise OptionError("`keep` and `max_bad_rows` need `input`")
        if self.data is not None and is_uri(self.out) and not is_folder(Path(self.out)):
            raise OptionError(
                f"`out` {self.out} is the URI of a file, but scores of `data` in a store are "
                "written to a folder; leave its ending out"
            )

    @property
    def in_parts(self) -> bool:
        """Whether each rank writes its own scores."""
        return self.data is not None and (is_uri(self.out) or is_folder(Path(self.out)))


def run(options: Options) -> None:
    """Scores on the ranks torchrun started, or on one."""
    if options.data is not None:
        if Package.is_one(options.run):
            raise OptionError(
                f"{options.run} is an exported model, which scores raw rows; give `input`"
            )
        with process_group(options.device) as ranks:
            _score_split(options, ranks)
        return
    with staged(options.out) as out:
        if Package.is_one(options.run):
            _score_with_package(options, out)
            return
        with process_group(options.device) as ranks:
            _score_rows(options, out, ranks)


def _score_with_package(options: Options, out: Path) -> None:
    """In this process."""
    if options.step is not None or options.sharding != "auto" or options.device != "auto":
        raise OptionError("`step`, `sharding` and `device` are for runs, not for exported models")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptionError("an exported model is scored by one process; start it without torchrun")
    model = Package.open(options.run)
    jobs, score_folder = _jobs(options, out, lambda: _made_by(options, model.fingerprint))
    predictor = Predictor(options.run, calibrated=options.calibrated)
    written, bad_rows = Written(), BadRows(options.max_bad_rows)
    for rows, scores in jobs:
        bad_before = bad_rows.count
        blocks = predictor.score_blocks(
            rows, keep=options.keep, bad_rows=bad_rows, batch_size=options.batch_size
        )
        of_job = write_scores(blocks, scores, predictor.tasks)
        if score_folder is not None:
            bad = bad_rows.count - bad_before
            score_folder.record(Path(rows[0]), scores, rows=of_job.impressions, bad_rows=bad)
        written.impressions += of_job.impressions
        written.add(of_job.counts)
    print(f"model: {options.run}, {model.method}, step {model.step}")
    training = PreparedDataSet.open(options.run / PREPROCESSING, data_files=False)
    _tell(options, written, bad_rows, training)


def _score_split(options: Options, ranks: Ranks) -> None:
    assert options.data is not None
    folder = RunFolder.open(options.run)
    if not options.in_parts:
        ranks.from_first(lambda: refuse_existing(Path(options.out)))
    step = ranks.from_first(lambda: chosen_step(folder, options.step))
    dataset = PreparedDataSet.open(options.data)
    folder.check_data(options.data, dataset.description())
    weights = folder.config["options"]["history_weights"]
    if options.in_parts:
        split = stream_in_order(
            dataset, options.split, ranks=ranks.world_size, history_weights=weights
        )
    elif dataset.root.local is None:
        raise OptionError(
            f"{dataset.root} is in a store, so each rank writes its own scores; give a folder or "
            "its URI as `out`"
        )
    else:
        split = MappedSplit.open(dataset, options.split, history_weights=weights)
    calibration = folder.calibration(step) if options.calibrated else None
    model = restore(
        folder, ranks, batch_size=options.batch_size, sharding=options.sharding, step=step
    )
    if isinstance(split, StreamedSplit):
        score_streamed(
            model,
            split,
            options.out,
            ranks,
            batch_size=options.batch_size,
            calibration=calibration,
        )
    else:
        score(
            model,
            split,
            Path(options.out),
            ranks,
            batch_size=options.batch_size,
            calibration=calibration,
        )
    if ranks.is_first:
        print(described(folder, step))
        print(f"{split.impressions:,} impressions scored: {options.out}")


def _score_rows(options: Options, out: Path, ranks: Ranks) -> None:
    folder = RunFolder.open(options.run)
    step = ranks.from_first(lambda: chosen_step(folder, options.step))
    ranks.from_first(lambda: check_preprocessing(folder))
    calibration = folder.calibration(step) if options.calibrated else None
    jobs, score_folder = ranks.from_first(
        lambda: _jobs(options, out, lambda: _made_by(options, identity(folder, step), calibration))
    )
    written, bad_rows, models = Written(), BadRows(options.max_bad_rows), []
    for rows, scores in jobs:
        laid_out = scores.with_name(f"{scores.name}.rows")
        ranks.from_first(lambda there=laid_out: refuse_existing(there))
        bad_before = bad_rows.count
        try:
            encoded = ranks.from_first(
                lambda rows=rows, there=laid_out: encode_rows(
                    folder, rows, there, keep=options.keep, bad_rows=bad_rows
                )
            )
            if not models:
                models.append(
                    restore(
                        folder,
                        ranks,
                        batch_size=options.batch_size,
                        sharding=options.sharding,
                        step=step,
                    )
                )
            split = MappedSplit.map(laid_out, folder.schema)
            score(
                models[0],
                split,
                scores,
                ranks,
                batch_size=options.batch_size,
                rows=encoded,
                calibration=calibration,
            )
        finally:
            if ranks.is_first:
                remove(laid_out)
        written.impressions += encoded.written.impressions
        written.add(encoded.written.counts)
        if score_folder is not None and ranks.is_first:
            bad = bad_rows.count - bad_before
            score_folder.record(
                Path(rows[0]), scores, rows=encoded.written.impressions, bad_rows=bad
            )
    if ranks.is_first:
        print(described(folder, step))
        expected = PreparedDataSet.open(folder.preprocessing, data_files=False)
        _tell(options, written, bad_rows, expected)


Job = tuple[Sequence[str], Path]
"""Input files, and the file of their scores."""


def _jobs(
    options: Options, out: Path, made_by: Callable[[], dict[str, Any]]
) -> tuple[list[Job], ScoreFolder | None]:
    """What is still to be scored, and the folder it goes to, if it is one."""
    inputs: list[str] = []
    for given in options.input:
        inputs += [given] if is_uri(given) else map(str, files_of(Path(given)))
    if not is_folder(out):
        refuse_existing(out)
        return [(inputs, out)], None
    for place in (options.out, *inputs):
        if is_uri(place):
            raise OptionError(
                f"{place} is a URI, but with a folder as `out`, files are scored one by one on "
                "a disk; give an `out` that ends in .parquet"
            )
    folder = ScoreFolder(out, made_by())
    return [([str(path)], scores) for path, scores in folder.open(list(map(Path, inputs)))], folder


def _made_by(
    options: Options, model: str, calibration: Calibration | None = None
) -> dict[str, Any]:
    return {
        "model": model,
        "calibrated": options.calibrated if calibration is None else calibration.to_dict(),
        "keep": list(options.keep),
        "max_bad_rows": options.max_bad_rows,
    }


def _tell(options: Options, written: Written, bad_rows: BadRows, training: PreparedDataSet) -> None:
    """What was scored, what ids it held, and what looks wrong."""
    usual = {name: of["test"] for name, of in training.statistics.unknown.items()}
    lines = [["id feature", "missing", "unknown", "unknown in test"]]
    for name, counts in written.counts.items():
        missing = counts.missing / max(1, counts.impressions)
        unknown = counts.unknown / max(1, counts.ids)
        lines.append([name, f"{missing:.1%}", f"{unknown:.1%}", f"{usual[name]:.1%}"])
    if len(lines) > 1:
        print("\n".join(aligned(lines)))
    for sentence in unknown_warnings(written.counts, usual):
        print(f"warning: {sentence}")
    if bad_rows.count:
        print(f"{bad_rows.count:,} rows without scores; the first of them:")
        print("\n".join(f"  {sentence}" for sentence in bad_rows.examples))
    print(f"{written.impressions:,} impressions scored: {options.out}")
