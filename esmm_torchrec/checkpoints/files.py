"""Files of checkpoints on disk.

    checkpoints/
        best.json                 step of the best checkpoint, if one was marked
        step-00001234/
            checkpoint.json       step, reader position and the like; size and CRC-32 of each file
            .metadata, *.distcp   weights and optimiser state, torch.distributed.checkpoint's files
            rank-00000.pt         state that belongs to one rank

A checkpoint is written as `step-*.partial`, flushed to disk and then renamed, so every folder with
a final name is complete. `step-*.removed` is a checkpoint that is being deleted, and
`step-*.replaced` a checkpoint whose step has been saved again.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esmm_torchrec.durable import replace_file, synchronise, write_durably
from esmm_torchrec.errors import RunError

FORMAT_VERSION = 2

_PREFIX = "step-"
_DESCRIPTION = "checkpoint.json"
_BEST = "best.json"
_CHUNK_BYTES = 1 << 22


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    """Returns step → folder of the complete checkpoints, in ascending order."""
    found = {
        int(path.name.removeprefix(_PREFIX)): path
        for path in folder.glob(f"{_PREFIX}*")
        if path.name.removeprefix(_PREFIX).isdecimal()
    }
    return dict(sorted(found.items()))


def find_checkpoint(folder: Path, step: int | None = None) -> Path | None:
    """Returns the checkpoint of a step, or the last one; None if the folder has no checkpoint.

    Raises:
        RunError: there is no checkpoint of that step.
    """
    found = checkpoint_folders(folder)
    if step is not None and step not in found:
        there = ", ".join(map(str, found)) or "none"
        raise RunError(f"{folder} has no checkpoint of step {step}; it has: {there}")
    if not found:
        return None
    return found[max(found) if step is None else step]


def model_checkpoint(folder: Path, step: int | None = None) -> Path | None:
    """Returns the checkpoint with the model of a run: that of a step, or the best one if one is
    marked, or the last one; None if the folder has no checkpoint.

    Raises:
        RunError: there is no checkpoint of that step, or best.json is damaged.
    """
    return find_checkpoint(folder, find_best(folder) if step is None else step)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Returns the path of the checkpoint of a step, which need not exist."""
    return folder / f"{_PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Returns the number of steps after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def rank_file(rank: int) -> str:
    """Returns the name of the file with the state of one rank."""
    return f"rank-{rank:05d}.pt"


def written_by(path: Path, rank: int) -> dict[str, tuple[int, int]]:
    """Returns name → (bytes, CRC-32) of the files that a rank wrote to a checkpoint."""
    own = [rank_file(rank), *([".metadata"] if rank == 0 else [])]
    files = [path / name for name in own if (path / name).exists()]
    files += path.glob(f"__{rank}_*.distcp")
    return {file.name: (file.stat().st_size, _crc32(file)) for file in files}


def complete(
    partial: Path,
    final: Path,
    *,
    description: Mapping[str, Any],
    files: Mapping[str, tuple[int, int]],
) -> None:
    """Writes the description of a checkpoint and renames it to its final name, replacing an
    existing checkpoint."""
    body = {"format_version": FORMAT_VERSION, **description, "files": dict(sorted(files.items()))}
    write_durably(
        partial / _DESCRIPTION,
        json.dumps({"crc32": zlib.crc32(json.dumps(body).encode()), "checkpoint": body}).encode(),
    )
    synchronise(partial)
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    synchronise(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def read_description(path: Path) -> dict[str, Any]:
    """Returns the description that was passed to `complete`, and "files".

    Raises:
        RunError: it cannot be read or was changed.
    """
    try:
        content = json.loads((path / _DESCRIPTION).read_text())
        body = content["checkpoint"]
        if zlib.crc32(json.dumps(body).encode()) != content["crc32"]:
            raise ValueError("its content does not match its checksum")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise broken(path, f"{_DESCRIPTION}: {error}") from error
    return body


def check_files(
    path: Path, files: Mapping[str, tuple[int, int]], *, rank: int, num_ranks: int
) -> None:
    """Compares the files of a checkpoint with their recorded sizes and checksums; each rank reads
    its share of them.

    Raises:
        RunError: a file is missing or differs.
    """
    for index, (name, (size, crc32)) in enumerate(files.items()):
        try:
            found = (path / name).stat().st_size
            if found != size:
                raise broken(path, f"{name} has {found:,} bytes instead of {size:,}")
            if index % num_ranks == rank and _crc32(path / name) != crc32:
                raise broken(path, f"{name} does not match its checksum")
        except OSError as error:
            raise broken(path, f"{name}: {(error.strerror or str(error)).lower()}") from error


def broken(path: Path, reason: str) -> RunError:
    """Returns the error for a checkpoint that cannot be used."""
    return RunError(
        f"checkpoint {path} is damaged or belongs to another model ({reason}); delete it to resume "
        "from an earlier one, or train again"
    )


def remove(path: Path) -> None:
    """Deletes a checkpoint if it exists. It is renamed first, so that what an interrupted deletion
    leaves is not mistaken for a complete checkpoint."""
    if path.exists():
        removed = path.rename(path.with_name(f"{path.name}.removed"))
        shutil.rmtree(removed)


def remove_leftovers(folder: Path) -> None:
    """Deletes the remains of interrupted saves and deletions. A checkpoint whose replacement was
    interrupted gets its name back."""
    for path in folder.glob(f"{_PREFIX}*.replaced"):
        if not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))
    for ending in ("partial", "removed", "replaced"):
        for path in folder.glob(f"{_PREFIX}*.{ending}"):
            shutil.rmtree(path, ignore_errors=True)


def remove_later(folder: Path, step: int) -> None:
    """Deletes the checkpoints of steps beyond `step`."""
    for later, path in checkpoint_folders(folder).items():
        if later > step:
            remove(path)


def prune(folder: Path, *, keep_last: int) -> None:
    """Deletes all checkpoints except the last ones and the best one."""
    best = find_best(folder)
    for step, path in list(checkpoint_folders(folder).items())[:-keep_last]:
        if step != best:
            remove(path)


def mark_best(folder: Path, step: int) -> None:
    """Records that the checkpoint of a step is the best one."""
    content = {"step": step, "crc32": zlib.crc32(str(step).encode())}
    replace_file(folder / _BEST, json.dumps(content).encode())


def unmark_best(folder: Path) -> None:
    """Deletes the mark of the best checkpoint, so that the last one is the model again."""
    (folder / _BEST).unlink(missing_ok=True)


def find_best(folder: Path) -> int | None:
    """Returns the step of the best checkpoint; None if none is marked.

    Raises:
        RunError: best.json is damaged.
    """
    try:
        content = json.loads((folder / _BEST).read_text())
        step = content["step"]
        if zlib.crc32(str(step).encode()) != content["crc32"]:
            raise ValueError
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        raise RunError(
            f"{folder / _BEST}, which names the best checkpoint, is damaged; delete it to use the "
            "last one"
        ) from None
    return step if step in checkpoint_folders(folder) else None


def _crc32(path: Path) -> int:
    crc32 = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32
