"""Raw Ali-CCP files of a split, plain or in their archive, read in blocks of whole lines."""

from __future__ import annotations

import contextlib
import gzip
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

from esmm_torchrec.data.prepared_form import SplitName
from esmm_torchrec.data.sources.ali_ccp.fields import COMMON, SKELETON
from esmm_torchrec.data.sources.ali_ccp.lines import Block
from esmm_torchrec.errors import DataError

MAX_LINE_BYTES = 256 << 20
"""Maximum number of bytes to read without finding a newline."""


class RawFile(NamedTuple):
    """An open raw file, either plain or within its archive."""

    name: str
    """File name; within an archive, preceded by the name of the archive."""
    path: str
    """The name with its folder."""
    size: int
    stream: IO[bytes]


class Folder:
    """Raw files in a folder, not archived."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)

    @property
    def names(self) -> list[str]:
        """Names of the files in progress bars and errors."""
        return [path.name for path in self._files.values()]

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[RawFile]:
        """Opens one of the raw files, by its original name."""
        path = self._files[name]
        with path.open("rb", buffering=0) as stream:
            yield RawFile(path.name, str(path), path.stat().st_size, stream)

    def close(self) -> None:
        """Does nothing: no file stays open between reads."""


class Archive:
    """Raw files inside a tar.gz, read as a stream: forward to a later member, from the beginning
    again for an earlier one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._gzip: gzip.GzipFile | None = None
        self._tar: tarfile.TarFile | None = None

    @property
    def names(self) -> list[str]:
        return [self._path.name]

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[RawFile]:
        try:
            member = self._find(name)
            assert self._tar is not None
            stream = self._tar.extractfile(member)
            if stream is None:
                raise DataError(f"{name} in {self._path} is not a file; download the archive again")
            with stream:
                label = f"{self._path.name}: {name}"
                yield RawFile(label, str(self._path.with_name(label)), member.size, stream)
        except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error):
            raise DataError(f"{self._path} is truncated or damaged; download it again") from None

    def _find(self, name: str) -> tarfile.TarInfo:
        started_here = self._tar is None
        if self._tar is None:
            self._gzip = gzip.GzipFile(self._path)
            self._tar = tarfile.TarFile.open(fileobj=self._gzip, mode="r|", bufsize=1 << 20)
        while (member := self._tar.next()) is not None:
            if member.isfile() and Path(member.name).name == name:
                return member
        self.close()
        if started_here:
            raise DataError(f"{self._path} does not contain {name}; download it again")
        return self._find(name)

    def close(self) -> None:
        if self._tar is not None and self._gzip is not None:
            self._tar.close()
            self._gzip.close()
        self._tar = self._gzip = None


def locate(raw: Path, split: SplitName) -> Folder | Archive:
    """Returns the raw files of a split: the two CSV files if both exist, otherwise the archive."""
    wanted = (COMMON.file(split), SKELETON.file(split))
    found: dict[str, Path] = {}
    for name in wanted:
        for path in (raw / name, *sorted(raw.glob(f"*/{name}"))):
            if path.is_file():
                found.setdefault(name, path)
    archive = raw / f"sample_{split}.tar.gz"
    if len(found) < len(wanted):
        if archive.is_file():
            return Archive(archive)
        missing = [name for name in wanted if name not in found]
        if len(missing) == 1:
            raise DataError(f"{raw / missing[0]} is missing; put it beside the other raw files")
        raise DataError(
            f"{raw} holds neither {wanted[1]} and {wanted[0]} nor {archive.name}; download "
            "Ali-CCP, or generate such data with "
            f"'esmm-torchrec generate {raw} --impressions 100000'"
        )
    for path in found.values():
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty; download it again")
    return Folder(found)


def read_blocks(file: RawFile, block_bytes: int) -> Iterator[Block]:
    """Yields blocks of whole lines, about `block_bytes` each."""
    line, rest = 1, b""
    while data := file.stream.read(block_bytes):
        cut = data.rfind(b"\n") + 1
        if cut == 0:
            rest += data
            if len(rest) > MAX_LINE_BYTES:
                raise DataError(
                    f"{file.path}, line {line}: longer than {MAX_LINE_BYTES} bytes; this is not an "
                    "Ali-CCP file"
                )
            continue
        text, rest = rest + data[:cut], data[cut:]
        yield Block(line, text)
        line += text.count(b"\n")
    if rest:
        yield Block(line, rest + b"\n")
    elif line == 1:
        raise DataError(f"{file.path} is empty; download it again")
