"""`esmm-torchrec score`, which runs on any number of ranks under torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import tyro

from esmm_torchrec.cli.restored import RestoreOptions
from esmm_torchrec.cli.terminal import aligned
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.sources.bad_rows import BadRows
from esmm_torchrec.data.sources.raw_tables import files_of
from esmm_torchrec.data.storage import is_uri, staged
from esmm_torchrec.data.stream import StreamedSplit, stream_in_order
from esmm_torchrec.errors import OptionError
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
from esmm_torchrec.serving.scored_rows import Written, score_columns, unknown_warnings
from esmm_torchrec.serving.scoring import (
    check_preprocessing,
    encode_rows,
    remove,
    score,
    score_streamed,
)
from esmm_torchrec.sharding.process_group import Ranks, process_group


@dataclass(frozen=True, kw_only=True)
class Options(RestoreOptions):
    """Write the sample_id, pctr, pcvr and pctcvr of every impression, in order.

    With a folder as --out, each file of --input is scored to its own output file, and an
    interrupted command resumes from where it stopped. If --data is scored to a folder, which may be
    a URI, each rank reads one contiguous part of the data set and writes a file of scores;
    scores.json lists these files in order.
    """

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Run folder, or a package that 'export' wrote."""
    out: str
    """File to write, whose name ends in .parquet, .csv or .arrow, or a folder; or its URI."""
    data: str | None = None
    """Prepared data set (a folder or its URI) with the same vocabularies as the training data."""
    input: tuple[str, ...] = ()
    """Instead of --data: Parquet, Arrow or text files of raw rows, with the column names of the
    data that was prepared; also folders, file patterns, and URIs of Parquet files. Labels are not
    needed."""
    keep: tuple[str, ...] = ()
    """Columns of --input to write in addition to the scores."""
    max_bad_rows: int = 0
    """Maximum number of rows of --input that cannot be scored; their scores are null."""
    split: Literal["train", "test"] = "test"
    """Split of --data to score."""
    calibrated: bool = False
    """Write the probabilities as calibrated by 'calibrate'. For a package, this is fixed at
    export."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
        """Whether each rank writes its own scores of `data`."""
        return is_uri(self.out) or is_folder(Path(self.out))


def run(options: Options) -> None:
    """Scores on the ranks that torchrun started, or on one."""
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
    if options.step is not None or options.sharding != "auto" or options.device != "auto":
        raise OptionError("`step`, `sharding` and `device` are for runs, not for exported models")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptionError("an exported model is scored by one process; start it without torchrun")
    model = Package.open(options.run)
    jobs = _Jobs.of(options, out, model.fingerprint, options.calibrated)
    predictor = Predictor(options.run, calibrated=options.calibrated)

    def score_files(files: Sequence[str], scores: Path, bad_rows: BadRows) -> Written:
        written = Written()

        def tables() -> Iterator[pa.Table]:
            for read, of_block, counts in predictor.score_blocks(
                files, keep=options.keep, bad_rows=bad_rows, batch_size=options.batch_size
            ):
                written.add(len(read.bad), counts)
                yield score_columns(of_block, predictor.tasks, read.sample_ids, read.bad, read.kept)

        refuse_existing(scores)
        write_scores(scores, tables())
        return written

    bad_rows = BadRows(options.max_bad_rows)
    written = jobs.do(score_files, bad_rows)
    print(f"model: {options.run}, {model.method}, step {model.step}")
    _tell(options, written, bad_rows, options.run / PREPROCESSING)


def _score_split(options: Options, ranks: Ranks) -> None:
    assert options.data is not None
    folder = RunFolder.open(options.run)
    if not options.in_parts:
        ranks.from_first(lambda: refuse_existing(Path(options.out)))
    step = ranks.from_first(lambda: chosen_step(folder, options.step))
    dataset = PreparedDataSet.open(options.data)
    folder.check_data(options.data, dataset.description())
    weights = folder.history_weights
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
    model = options.restore(folder, ranks, step)
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
    calibrated = False if calibration is None else calibration.to_dict()
    jobs = ranks.from_first(lambda: _Jobs.of(options, out, identity(folder, step), calibrated))
    model = cache(lambda: options.restore(folder, ranks, step))

    def score_files(files: Sequence[str], scores: Path, bad_rows: BadRows) -> Written:
        laid_out = scores.with_name(f"{scores.name}.rows")
        ranks.from_first(lambda: refuse_existing(laid_out))
        try:
            encoded = ranks.from_first(
                lambda: encode_rows(folder, files, laid_out, keep=options.keep, bad_rows=bad_rows)
            )
            score(
                model(),
                MappedSplit.map(laid_out, folder.schema),
                scores,
                ranks,
                batch_size=options.batch_size,
                rows=encoded,
                calibration=calibration,
            )
        finally:
            if ranks.is_first:
                remove(laid_out)
        return encoded.written

    bad_rows = BadRows(options.max_bad_rows)
    written = jobs.do(score_files, bad_rows, ranks.is_first)
    if ranks.is_first:
        print(described(folder, step))
        _tell(options, written, bad_rows, folder.preprocessing)


@dataclass(frozen=True)
class _Jobs:
    """The files that are still to be scored."""

    files: Sequence[tuple[Sequence[str], Path]]
    """Pairs of input files and the file for their scores."""
    folder: ScoreFolder | None
    """Folder of the scores; None if they go to one file."""

    @classmethod
    def of(cls, options: Options, out: Path, model: str, calibrated: Any) -> _Jobs:
        """Creates the jobs; `model` and `calibrated` identify what the scores depend on."""
        inputs: list[str] = []
        for given in options.input:
            inputs += [given] if is_uri(given) else map(str, files_of(Path(given)))
        if not is_folder(out):
            refuse_existing(out)
            return cls([(inputs, out)], None)
        for place in (options.out, *inputs):
            if is_uri(place):
                raise OptionError(
                    f"{place} is a URI, but with a folder as `out`, files are scored one by one on "
                    "a disk; give an `out` that ends in .parquet"
                )
        made_by = {
            "model": model,
            "calibrated": calibrated,
            "keep": list(options.keep),
            "max_bad_rows": options.max_bad_rows,
        }
        folder = ScoreFolder(out, made_by)
        todo = folder.open(list(map(Path, inputs)))
        return cls([([str(path)], scores) for path, scores in todo], folder)

    def do(
        self,
        score_files: Callable[[Sequence[str], Path, BadRows], Written],
        bad_rows: BadRows,
        is_first: bool = True,
    ) -> Written:
        """Scores the files one after the other; rank 0 records each finished file."""
        written = Written()
        for files, scores in self.files:
            bad_before = bad_rows.count
            own = score_files(files, scores, bad_rows)
            written.add(own.impressions, own.counts)
            if self.folder is not None and is_first:
                bad = bad_rows.count - bad_before
                self.folder.record(Path(files[0]), scores, rows=own.impressions, bad_rows=bad)
        return written


def _tell(options: Options, written: Written, bad_rows: BadRows, preprocessing: Path) -> None:
    """Prints the shares of missing and unknown ids, warnings, bad rows and the number of scores."""
    training = PreparedDataSet.open(preprocessing, data_files=False)
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
