"""Writes files of scores, and keeps track of those that are still missing from a folder.

A file appears once it is complete. A folder of scores has one file for each input file, and
`scores.json`, which records the model and the input files. So an interrupted command resumes after
the last complete file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from esmm_torchrec.errors import OptionError, RunError
from esmm_torchrec.progress import progress_bar

SUFFIXES = (".parquet", ".csv", ".arrow")
MANIFEST = "scores.json"


def is_folder(out: Path) -> bool:
    """Whether scores go to a folder of files rather than to one file.

    Raises:
        OptionError: the name fits neither.
    """
    if out.suffix.lower() in SUFFIXES:
        return False
    if out.suffix and not out.is_dir():
        raise OptionError(
            f"`out` {out} has an unknown file type; its name must end in one of "
            f"{', '.join(SUFFIXES)}, or give a folder, whose name has no dot"
        )
    return True


def refuse_existing(out: Path) -> None:
    """Raises RunError if `out` exists; otherwise creates its parent folder."""
    if out.exists():
        raise RunError(f"{out} already exists; remove it or choose another `out`")
    out.parent.mkdir(parents=True, exist_ok=True)


def write_scores(out: Path, tables: Iterator[pa.Table], *, rows: int | None = None) -> None:
    """Writes scores to a file, whose type follows from its name; it appears once it is complete.

    Args:
        out: the file.
        tables: rows of the file in one or several blocks, as returned by `score_columns`.
        rows: number of rows, for a progress bar; None: unknown.

    Raises:
        OptionError: a column cannot be written to a file of this type.
    """
    first = next(tables)
    partial = out.with_name(f"{out.name}.partial")
    try:
        with (
            closing(_open(partial, out.suffix.lower(), first.schema)) as writer,
            progress_bar("Scoring", rows, "rows") as bar,
        ):
            for table in chain([first], tables):
                writer.write_table(table.cast(first.schema))
                bar.update(len(table))
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)


def _open(
    path: Path, suffix: str, schema: pa.Schema
) -> pa.ipc.RecordBatchFileWriter | pq.ParquetWriter | pyarrow.csv.CSVWriter:
    if suffix == ".arrow":
        return pa.ipc.new_file(str(path), schema)
    if suffix == ".parquet":
        return pq.ParquetWriter(path, schema, compression="zstd")
    for field in schema:
        if pa.types.is_nested(field.type):
            raise OptionError(
                f"`keep` {field.name} contains lists, which CSV cannot hold; give an `out` "
                "that ends in .parquet"
            )
    return pyarrow.csv.CSVWriter(str(path), schema)


@dataclass(frozen=True)
class ScoreFolder:
    """A folder of scores.

    Args:
        path: the folder.
        made_by: what the scores depend on, as values for JSON.
    """

    path: Path
    made_by: Mapping[str, Any]

    def open(self, inputs: Sequence[Path]) -> list[tuple[Path, Path]]:
        """Creates the folder, or resumes an existing one.

        Args:
            inputs: the input files.

        Returns:
            Pairs (input, output) of the files that are still to be scored.

        Raises:
            RunError: the folder contains something else, scores of another model, or scores of an
                input file that has changed since.
            OptionError: two inputs would have the same output.
        """
        outputs = {path: self.path / f"{path.name.partition('.')[0]}.parquet" for path in inputs}
        if len(set(outputs.values())) < len(outputs):
            name = next(p for p in outputs.values() if list(outputs.values()).count(p) > 1).name
            raise OptionError(f"two input files would be scored to {name}; rename one")
        manifest = self.path / MANIFEST
        if not manifest.exists():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise RunError(
                    f"{self.path} exists and is not a folder of scores; choose another `out`"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            self._write({})
        done = self._read()
        todo = []
        for path, out in outputs.items():
            before = done.get(out.name) if out.exists() else None
            if before is not None and before["input"] != _identity(path):
                raise RunError(f"{path} has changed since {out} was made; remove {out}")
            if before is None:
                out.unlink(missing_ok=True)
                todo.append((path, out))
        return todo

    def record(self, path: Path, out: Path, **counts: int) -> None:
        """Records that an input file was scored."""
        self._write(self._read() | {out.name: {"input": _identity(path), **counts}})

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads((self.path / MANIFEST).read_text())
            made_by, files = found["made_by"], dict(found["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self.path / MANIFEST} is broken ({error}); remove it") from None
        if made_by != json.loads(json.dumps(self.made_by)):
            raise RunError(
                f"{self.path} holds scores of another model or of other options; choose another "
                "`out`"
            )
        return files

    def _write(self, files: Mapping[str, Any]) -> None:
        manifest = self.path / MANIFEST
        partial = manifest.with_name(f"{MANIFEST}.partial")
        partial.write_text(json.dumps({"made_by": self.made_by, "files": files}, indent=2) + "\n")
        partial.rename(manifest)


def _identity(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"file": path.name, "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
