"""Machines: presets, files, and the bandwidths TorchRec's planner is given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torchrec.distributed.planner.types import CollectiveType

from esmm_torchrec.errors import OptionError, PlanError
from esmm_torchrec.planning.hardware import (
    PRESETS,
    RankBandwidths,
    preset,
    read_hardware,
    write_hardware,
)
from esmm_torchrec.sharding.search import GIB


def test_every_preset_says_where_its_numbers_come_from() -> None:
    assert list(PRESETS) == ["a100-40", "a100-80", "h100", "h200", "b200", "cpu"]
    for hardware in PRESETS.values():
        assert any("https://" in source for source in hardware.sources)
    assert preset("H100") is PRESETS["h100"]
    # What nvidia-smi reports, in MiB.
    assert PRESETS["b200"].memory_gib == 183_359 // 1024
    assert PRESETS["h200"].memory_gib == 143_771 // 1024
    assert PRESETS["b200"].memory_gb_s == pytest.approx(7680 / 8 * 2 * 3.996, abs=0.5)
    with pytest.raises(OptionError, match="no GPU 'v100'; use a100-40"):
        preset("v100")


@pytest.mark.parametrize(("ranks", "local"), [(1, 1), (5, 5), (8, 8), (16, 8), (128, 8)])
def test_hosts_are_filled_one_after_another(ranks: int, local: int) -> None:
    assert preset("h100").local_world_size(ranks) == local


def test_a_host_left_half_empty_is_refused() -> None:
    with pytest.raises(OptionError, match="`gpus` 12 does not fill hosts of 8"):
        preset("h100").local_world_size(12)
    with pytest.raises(OptionError, match="`gpus` 0"):
        preset("h100").local_world_size(0)


def test_the_topology_has_the_presets_numbers_in_torchrecs_units() -> None:
    h100 = preset("h100")
    topology = h100.topology(16, memory_bytes=60 * GIB, host_memory_bytes=200 * GIB)
    assert topology.compute_device == "cuda"
    assert (topology.world_size, topology.local_world_size) == (16, 8)
    assert {device.storage.hbm for device in topology.devices} == {60 * GIB}
    assert {device.storage.ddr for device in topology.devices} == {200 * GIB}
    # 3350 GB/s are 3.35e9 bytes in a millisecond.
    assert topology.hbm_mem_bw == pytest.approx(3.35e9)
    assert topology.hbm_to_ddr_mem_bw == pytest.approx(64e6)
    cpu = preset("cpu").topology(2, memory_bytes=GIB, host_memory_bytes=0)
    assert cpu.devices[0].storage.ddr == GIB
    assert cpu.ddr_mem_bw == pytest.approx(307e6)


def test_collectives_take_as_long_as_their_bytes_over_the_links() -> None:
    intra, inter = 400.0, 50.0
    bandwidths = RankBandwidths(intra, inter)

    def time(kind: CollectiveType, world: int, local: int, output: float = 1.0) -> float:
        return output / bandwidths.get_bw(local, world, kind)

    # One rank sends nothing.
    assert time(CollectiveType.ALL_TO_ALL, 1, 1) == 0
    # One host of 8: 7/8 of the output leave the rank.
    assert time(CollectiveType.ALL_TO_ALL, 8, 8) == pytest.approx(7 / 8 / intra)
    assert time(CollectiveType.REDUCE_SCATTER, 8, 8) == pytest.approx(7 / 8 / intra)
    assert time(CollectiveType.ALL_REDUCE, 8, 8) == pytest.approx(2 * 7 / 8 / intra)
    # Four hosts of 8: 24/32 to other hosts through the card, 7/32 inside.
    assert time(CollectiveType.ALL_TO_ALL, 32, 8) == pytest.approx(24 / 32 / inter + 7 / 32 / intra)
    # A ring over all eight cards is as fast as NVLink here.
    assert time(CollectiveType.REDUCE_SCATTER, 32, 8) == pytest.approx(31 / 32 / intra)
    # Two passes of a ring on any number of hosts, by a formula that counts 1, 3/2 or 3.
    for world, counted in ((8, 1.0), (16, 1.5), (24, 3.0), (32, 3.0)):
        once = (world - 1) / world / intra
        assert counted * time(CollectiveType.ALL_REDUCE, world, 8) == pytest.approx(2 * once)
    # With slower cards the ring is as fast as the eight together.
    slow = RankBandwidths(intra, 10.0)
    assert slow.get_bw(8, 32, CollectiveType.ALL_GATHER) == pytest.approx(80 * 32 / 31)


def test_a_machine_survives_its_file(tmp_path: Path) -> None:
    mine = replace(preset("cpu"), name="this machine", intra_host_gb_s=1.25, sources=("measured",))
    write_hardware(mine, tmp_path / "mine.yaml")
    assert read_hardware(tmp_path / "mine.yaml") == mine


def test_a_file_may_change_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "half.yaml"
    path.write_text("base: H100\nmemory_gib: 40\n")
    half = read_hardware(path)
    assert (half.name, half.memory_gib, half.memory_gb_s) == ("half", 40, 3350)
    assert half.sources == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: h101\n", "base 'h101' is none of"),
        ("base: [h100]\n", "base .'h100'. is none of"),
        ("base: 7\n", "base 7 is none of"),
        ("base: h100\nmemory_gib: .nan\n", "memory_gib must be above 0 and below .* not nan"),
        ("base: h100\nmemory_gib: .inf\n", "memory_gib must be above 0 and below .* not inf"),
        ("base: h100\nmemory_gb_s: .nan\n", "memory_gb_s must be above 0 and below .* not nan"),
        ("base: h100\nmemory: 40\n", "unknown field 'memory'"),
        ("base: h100\nmemory_gib: much\n", "memory_gib: expected 'float', got 'str'"),
        ("base: h100\nmemory_gib: -1\n", "memory_gib must be above 0"),
        ("base: h100\nranks_per_host: 2.5\n", "ranks_per_host: expected 'int', got 'float'"),
        ("base: h100\ndevice: tpu\n", "device: invalid enum value 'tpu'; use cuda or cpu"),
        ("base: h100\nsources: none\n", "sources: expected 'array', got 'str'"),
        ("name: mine\n", "missing required field 'device'"),
        ("- h100\n", "must be a mapping"),
        ("base: h100\nbase: h200\n", "line 2 .*'base' occurs twice"),
        ("base: [\n", "line 2 is not the YAML"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(PlanError, match=expected) as raised:
        read_hardware(path)
    assert "\n" not in str(raised.value)
