"""Files and folders by path or URI, on a disk or in a store that pyarrow supports.

URIs are those of `pyarrow.fs.FileSystem.from_uri`: s3://, gs://, abfs://, hdfs:// or file://.
Object stores support neither renaming nor locking, so nothing here needs them. Their files appear
once they are complete.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Concatenate, ParamSpec, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from esmm_torchrec.errors import DataError

MAX_ATTEMPTS = 6
"""Number of attempts of a request to a store before its error is raised. The clients of most stores
also retry each attempt a few times."""

FIRST_WAIT = 0.25
"""Seconds between the first two attempts, on average; each further wait is twice as long."""

_PERMANENT = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "NO_SUCH_BUCKET",
)
"""Parts of the messages of errors that are permanent."""

T = TypeVar("T")
P = ParamSpec("P")


def _in_attempts(
    method: Callable[Concatenate[Location, P], T],
) -> Callable[Concatenate[Location, P], T]:
    """Decorates a method so that it is `retried`."""

    @wraps(method)
    def repeated(self: Location, *arguments: P.args, **named: P.kwargs) -> T:
        return self.retried(lambda: method(self, *arguments, **named))

    return repeated


@dataclass(frozen=True)
class Location:
    """A file or a folder, on this machine or in a store."""

    filesystem: pafs.FileSystem
    path: str
    """Path within `filesystem`."""
    name: str
    """Path or URI for messages, without credentials."""

    @classmethod
    def of(cls, place: Location | Path | str) -> Location:
        """Returns the location of a path or a URI.

        Raises:
            DataError: the URI is malformed, or this pyarrow does not support its scheme.
        """
        if isinstance(place, Location):
            return place
        if isinstance(place, Path) or not is_uri(place):
            return cls(pafs.LocalFileSystem(), str(place), str(place))
        try:
            filesystem, path = pafs.FileSystem.from_uri(place)
        except (pa.ArrowException, OSError, ValueError) as error:
            clean = _without_credentials(place)
            reason = str(error).replace(place, clean)
            raise DataError(
                f"the URI {clean} cannot be used ({reason}); "
                "give a path, or a URI such as s3://bucket/folder"
            ) from None
        if isinstance(filesystem, pafs.LocalFileSystem):
            return cls(filesystem, path, path)
        path = path.rstrip("/")
        return cls(filesystem, path, f"{urlsplit(place).scheme}://{path}")

    def __str__(self) -> str:
        return self.name

    def __truediv__(self, name: str) -> Location:
        return Location(self.filesystem, f"{self.path}/{name}", f"{self.name}/{name}")

    @property
    def absolute(self) -> str:
        """The name, with an absolute path if it is on this machine."""
        return self.name if self.local is None else str(self.local.resolve())

    @property
    def local(self) -> Path | None:
        """The path on this machine; None for a store."""
        return Path(self.path) if isinstance(self.filesystem, pafs.LocalFileSystem) else None

    @_in_attempts
    def size(self) -> int | None:
        """Returns the size of the file in bytes; None if it does not exist."""
        info = self.filesystem.get_file_info(self.path)
        return info.size if info.type == pafs.FileType.File else None

    @_in_attempts
    def open_input(self) -> pa.NativeFile:
        """Opens the file for random access; raises FileNotFoundError if it does not exist."""
        return self.filesystem.open_input_file(self.path)

    @_in_attempts
    def files_below(self) -> list[Location]:
        """Returns all files in the folder and its subfolders, sorted; none if it does not exist."""
        selector = pafs.FileSelector(self.path, recursive=True, allow_not_found=True)
        found = self.filesystem.get_file_info(selector)
        paths = sorted(info.path for info in found if info.type == pafs.FileType.File)
        beginning = self.name.removesuffix(self.path)
        return [Location(self.filesystem, path, beginning + path) for path in paths]

    @_in_attempts
    def open_output(self) -> pa.NativeFile:
        """Opens the file for writing from the start, and creates its folders if needed."""
        if self.local is not None:
            self.local.parent.mkdir(parents=True, exist_ok=True)
        return self.filesystem.open_output_stream(self.path)

    @_in_attempts
    def read_bytes(self) -> bytes:
        """Returns the content of the file; raises FileNotFoundError if it does not exist."""
        with self.filesystem.open_input_file(self.path) as file:
            return file.read()

    @_in_attempts
    def write_bytes(self, content: bytes) -> None:
        """Writes the whole file."""
        with self.open_output() as file:
            file.write(content)

    @_in_attempts
    def copy_from(self, path: Path) -> None:
        """Writes the file as a copy of a local one."""
        with path.open("rb") as source, self.open_output() as file:
            shutil.copyfileobj(source, file, 1 << 22)

    @_in_attempts
    def delete(self) -> None:
        """Deletes the file; raises FileNotFoundError if it does not exist."""
        self.filesystem.delete_file(self.path)

    @_in_attempts
    def sha256(self) -> str:
        """Returns the SHA-256 of the file, in hex."""
        found = hashlib.sha256()
        with self.filesystem.open_input_stream(self.path) as file:
            while content := file.read(1 << 20):
                found.update(content)
        return found.hexdigest()

    def retried(self, action: Callable[[], T]) -> T:
        """Returns the result of `action`. If the location is in a store, transient errors, such as
        a lost connection or "slow down", are retried with increasing waits.

        Raises:
            OSError: the last error.
        """
        wait = FIRST_WAIT
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return action()
            except OSError as error:
                permanent = isinstance(error, FileNotFoundError | NotADirectoryError) or any(
                    word in str(error) for word in _PERMANENT
                )
                if permanent or self.local is not None or attempt == MAX_ATTEMPTS:
                    raise
            # Jitter, so that many ranks do not retry at the same moment.
            time.sleep(wait * random.uniform(0.5, 1.5))
            wait *= 2
        raise AssertionError


@contextmanager
def reading(file: Location, remedy: str) -> Iterator[None]:
    """Turns errors in reading a file into DataError; `remedy` is the end of the message."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{file} is missing; {remedy}") from None
    except (pa.ArrowException, OSError) as error:
        of_system = isinstance(error, OSError)
        what = "cannot be read" if of_system else "is broken or cut short"
        reason = (of_system and error.strerror) or str(error)
        # Messages of Parquet have several lines.
        raise DataError(f"{file} {what} ({' '.join(reason.split())}); {remedy}") from None


class HashedOutput:
    """A file being written, with the checksum of its content; accepted by pyarrow's writers."""

    def __init__(self, location: Location) -> None:
        self._file = location.open_output()
        self._hash = hashlib.sha256()
        self.bytes = 0
        """Number of bytes written so far."""

    def write(self, content: bytes) -> int:
        """Appends bytes; returns their number."""
        self._hash.update(content)
        self._file.write(content)
        self.bytes += len(memoryview(content).cast("B"))
        return len(content)

    def flush(self) -> None:
        """Does nothing: the file is used only once it is complete."""

    def tell(self) -> int:
        """Returns the number of bytes written so far."""
        return self.bytes

    def writable(self) -> bool:
        """Returns True."""
        return True

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._file.closed

    def close(self) -> None:
        """Closes the file; in a store, it appears only now."""
        self._file.close()

    @property
    def checksum(self) -> str:
        """SHA-256 of the bytes written, in hex."""
        return self._hash.hexdigest()


@contextmanager
def staged(out: str, *, last: str | None = None) -> Iterator[Path]:
    """Yields a local path at which to create `out`: `out` itself, or for a URI, a path in a
    temporary folder, copied to it when the block ends.

    Args:
        out: a file or a folder.
        last: file of the folder to copy last, whose presence marks the folder as complete.

    Raises:
        DataError: `out` is a URI that already exists.
    """
    if not is_uri(out):
        yield Path(out)
        return
    target = Location.of(out)
    if target.size() is not None or target.files_below():
        raise DataError(f"{target} already exists; remove it or choose another `out`")
    with TemporaryDirectory() as folder:
        made = Path(folder) / target.path.rpartition("/")[2]
        yield made
        if made.is_file():
            target.copy_from(made)
        files = sorted(file for file in made.rglob("*") if file.is_file())
        for file in sorted(files, key=lambda file: file == made / (last or "")):
            (target / file.relative_to(made).as_posix()).copy_from(file)


def is_uri(place: Path | str) -> bool:
    """Returns whether `place` is a URI rather than a path."""
    return isinstance(place, str) and "://" in place


def _without_credentials(uri: str) -> str:
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
