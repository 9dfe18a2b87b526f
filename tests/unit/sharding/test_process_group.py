"""The process group of one rank, and which device a rank gets."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from esmm_torchrec.errors import OptionError
from esmm_torchrec.sharding.process_group import choose_device, process_group


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_after_an_error_the_next_block_begins_anew(error: type[BaseException]) -> None:
    """In a notebook, where a cell fails and is run again."""
    kept = []  # as a notebook keeps the last traceback, with all that its frames hold
    for _ in range(2):
        with pytest.raises(error) as raised, process_group("cpu"):
            raise error
        kept.append(raised)
        assert not dist.is_initialized()
    with process_group("cpu") as ranks:
        assert (ranks.rank, ranks.world_size) == (0, 1)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("option", "gpus", "ranks", "device"),
    [
        ("auto", 0, 2, "cpu"),
        ("auto", 1, 2, "cpu"),
        ("auto", 2, 2, "cuda"),
        ("auto", 8, 2, "cuda"),
        ("cpu", 8, 2, "cpu"),
        ("cuda", 2, 2, "cuda"),
    ],
)
def test_auto_takes_gpus_where_every_rank_has_one(
    option: str,
    gpus: int,
    ranks: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    chosen = [choose_device(option, rank, ranks) for rank in range(ranks)]  # pyright: ignore
    assert [one.type for one in chosen] == [device] * ranks
    if device == "cuda":
        assert [one.index for one in chosen] == list(range(ranks))
    said = capsys.readouterr().err.splitlines()
    expected = ["this machine has 2 ranks but GPUs for only 1; all ranks use the CPU"]
    assert said == (expected if (option, gpus) == ("auto", 1) else [])


def test_cuda_without_a_gpu_for_each_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cuda", 0, 2).index == 0
    with pytest.raises(OptionError, match=r"`device` cuda needs a GPU for each rank .* finds 1;"):
        choose_device("cuda", 1, 2)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            {"WORLD_SIZE": "2"},
            "the environment variable WORLD_SIZE is set and RANK and MASTER_ADDR and MASTER_PORT "
            "are not; start the ranks with torchrun, or unset WORLD_SIZE to use one process",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"},
            "the environment variable WORLD_SIZE is set and MASTER_PORT is not; start the ranks "
            "with torchrun, or unset WORLD_SIZE to use one process",
        ),
        (
            {"RANK": "x", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
            "the environment variable RANK is 'x' and should be a number; start the ranks with "
            "torchrun",
        ),
    ],
)
def test_an_environment_that_describes_part_of_a_group_is_refused(
    variables: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError) as refusal, process_group("cpu"):
        pass
    assert str(refusal.value) == sentence
    assert not dist.is_initialized()
