"""Descriptions of machines for the planner: presets with their sources, or a user's YAML file.

Bandwidths of presets are peaks from data sheets, for one rank and one direction, so estimates made
with them are best cases. `benchmarks/sharding.py` writes a file with measured bandwidths instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from torchrec.distributed.planner.types import (
    CollectiveType,
    GeneralizedCommsBandwidth,
    HardwareConfig,
    KernelConfig,
    Topology,
    TopologyFactory,
    TrainerConfig,
)

from esmm_torchrec.choices import check_choices
from esmm_torchrec.errors import OptionError, PlanError
from esmm_torchrec.planning.strict_yaml import load_yaml
from esmm_torchrec.sharding.forms import checked

BYTES_PER_MS = 1e6
"""Bytes per millisecond (TorchRec's unit) in 1 GB/s."""

MAX_NUMBER = 1e9
"""Exclusive upper bound of the numbers of a machine, in any unit."""

TowerDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Hardware:
    """A kind of machine. A rank is a GPU or, on a CPU, a process."""

    name: str
    device: Literal["cuda", "cpu"]
    ranks_per_host: int
    memory_gib: float
    """Memory of a rank: the GPU's memory, or the process's share of host memory."""
    host_memory_gib: float
    """A rank's share of host memory, in which the kernels fused_uvm* keep tables."""
    memory_gb_s: float
    """Bandwidth of a rank's memory (HBM, or host memory on a CPU) for one rank."""
    host_to_device_gb_s: float
    """Bandwidth between a GPU and host memory."""
    intra_host_gb_s: float
    """Bandwidth from a rank to the other ranks of its host (NVLink)."""
    inter_host_gb_s: float
    """Bandwidth from a rank to other hosts (its network card)."""
    float32_tflops: float
    """Peak of matrix products in float32 as training runs them (TF32 on a GPU)."""
    bfloat16_tflops: float
    tower_efficiency: float = 0.3
    """Share of the peak that the towers reach: an assumption, as their matrices are small."""
    backward_multiplier: float = 2.0
    """Backward time of a look-up, update included, relative to forward; 2 is TorchRec's value."""
    all_to_all_efficiency: float = 1.0
    """Share of the links' bandwidth that an all-to-all reaches; the next three are analogous."""
    reduce_scatter_efficiency: float = 1.0
    all_gather_efficiency: float = 1.0
    all_reduce_efficiency: float = 1.0
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choices(self)
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not 0 < value < MAX_NUMBER:
                raise PlanError(
                    f"hardware {self.name!r}: {name} must be above 0 and below "
                    f"{MAX_NUMBER:.0e}, not {value}"
                )
        for name in ("tower_efficiency", *(f"{kind.value}_efficiency" for kind in CollectiveType)):
            if getattr(self, name) > 1:
                raise PlanError(f"hardware {self.name!r}: {name} must be at most 1")

    def local_world_size(self, world_size: int) -> int:
        """Returns the number of ranks per host if `world_size` ranks fill hosts one after another.

        Raises:
            OptionError: the last of several hosts would not be full, or `world_size` is below 1.
        """
        if world_size < 1:
            raise OptionError(f"`gpus` {world_size} is not at least 1")
        if world_size <= self.ranks_per_host:
            return world_size
        if world_size % self.ranks_per_host:
            below = world_size - world_size % self.ranks_per_host
            raise OptionError(
                f"`gpus` {world_size} does not fill hosts of {self.ranks_per_host} "
                f"({self.name}); use {below} or {below + self.ranks_per_host}"
            )
        return self.ranks_per_host

    @property
    def bandwidths(self) -> RankBandwidths:
        """Bandwidths of collectives over the ranks of such machines."""
        return RankBandwidths(
            intra_host=self.intra_host_gb_s * BYTES_PER_MS,
            inter_host=self.inter_host_gb_s * BYTES_PER_MS,
            efficiency={kind: getattr(self, f"{kind.value}_efficiency") for kind in CollectiveType},
        )

    def all_reduce_ms(self, nbytes: int, world_size: int) -> float:
        """Returns the time of a ring all-reduce of `nbytes`: reduce-scatter, then all-gather."""
        once = self.bandwidths.of_links(
            self.local_world_size(world_size), world_size, CollectiveType.REDUCE_SCATTER
        )
        return 2 * nbytes / (once * self.all_reduce_efficiency)

    def topology(self, world_size: int, *, memory_bytes: int, host_memory_bytes: int) -> Topology:
        """Returns the machines in the form that TorchRec's planner takes.

        Args:
            world_size: number of ranks.
            memory_bytes: memory of each rank available to tables.
            host_memory_bytes: host memory per rank available to tables.
        """
        local_world_size = self.local_world_size(world_size)
        on_gpu = self.device == "cuda"
        return TopologyFactory.create_topology(
            trainer_config=TrainerConfig(world_size=world_size, local_world_size=local_world_size),
            hardware_config=HardwareConfig(
                hbm_cap_bytes=memory_bytes if on_gpu else None,
                ddr_cap_bytes=host_memory_bytes if on_gpu else memory_bytes,
                hbm_mem_bw=self.memory_gb_s * BYTES_PER_MS,
                ddr_mem_bw=self.memory_gb_s * BYTES_PER_MS,
                hbm_to_ddr_mem_bw=self.host_to_device_gb_s * BYTES_PER_MS,
            ),
            kernel_config=KernelConfig(
                compute_device=self.device,
                bwd_compute_multiplier=self.backward_multiplier,
                # Without this TorchRec plans every machine with the bandwidths of a V100.
                use_hardware_based_bandwidth=True,
                generalized_comms_bandwidths=self.bandwidths,
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values, as in a file."""
        return asdict(self) | {"sources": list(self.sources)}


@dataclass(frozen=True)
class RankBandwidths(GeneralizedCommsBandwidth):
    """Bandwidths of collectives, in bytes of a rank's output per ms.

    TorchRec divides the whole output of a rank by this bandwidth. In an all-to-all, the share for
    other hosts leaves through the rank's own network card and the share for its host over NVLink,
    one after the other. Reduce-scatter and all-gather run as rings through all network cards of a
    host, so that 1/hosts of the output crosses each card only once. (TorchRec's own
    BasicCommsBandwidths sends everything through one card as soon as there are two hosts, and
    all-reduces over the network even on one host.)
    """

    intra_host: float
    inter_host: float
    efficiency: Mapping[CollectiveType, float] = field(default_factory=dict)
    """Collective → share of the links' bandwidth that it reaches; 1 by default."""

    @property
    def intra_host_bw(self) -> float:
        """Bytes per ms to the ranks of the same host."""
        return self.intra_host

    @property
    def inter_host_bw(self) -> float:
        """Bytes per ms to other hosts."""
        return self.inter_host

    def get_bw(
        self, local_world_size: int, world_size: int, collective_type: CollectiveType
    ) -> float:
        """Returns bytes of a rank's output per ms; infinite if nothing leaves the rank."""
        share = self.efficiency.get(collective_type, 1.0)
        return share * self.of_links(local_world_size, world_size, collective_type)

    def of_links(
        self, local_world_size: int, world_size: int, collective_type: CollectiveType
    ) -> float:
        """Returns the same for a collective that reaches the full bandwidth of its links."""
        if world_size == 1:
            return float("inf")
        hosts = max(1, world_size // local_world_size)
        if collective_type == CollectiveType.ALL_TO_ALL:
            elsewhere = (world_size - local_world_size) / world_size if hosts > 1 else 0.0
            here = 1 - elsewhere - 1 / world_size
            return 1 / (elsewhere / self.inter_host + here / self.intra_host)
        ring = self.intra_host
        if hosts > 1:
            ring = min(self.intra_host, self.inter_host * local_world_size)
        once = ring * world_size / (world_size - 1)
        if collective_type == CollectiveType.ALL_REDUCE:
            # A ring makes two passes, whatever the number of hosts. TorchRec's formula counts one
            # on one host, one and a half on two and three on more.
            counted = {1: 1.0, 2: 1.5}.get(hosts, 3.0)
            return once * counted / 2
        return once


_DGX_A100 = "https://docs.nvidia.com/dgx/dgxa100-user-guide/introduction-to-dgxa100.html"
_DGX_H100 = "https://docs.nvidia.com/dgx/dgxh100-user-guide/introduction-to-dgxh100.html"
_DGX_B200 = "https://docs.nvidia.com/dgx/dgxb200-user-guide/introduction-to-dgxb200.html"
_A100 = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
)
_H100 = "https://www.nvidia.com/en-us/data-center/h100/"
_H200 = "https://www.nvidia.com/en-us/data-center/h200/"
_B200 = "https://www.nvidia.com/en-us/data-center/hgx/"
_B200_BUS = "https://github.com/pytorch/ao/pull/4002"
_XEON = "https://www.intel.com/content/www/us/en/products/sku/231746.html"

_A100_40_GB = Hardware(
    name="a100-40",
    device="cuda",
    ranks_per_host=8,
    memory_gib=40,
    host_memory_gib=128,
    memory_gb_s=1555,
    host_to_device_gb_s=32,
    intra_host_gb_s=300,
    inter_host_gb_s=25,
    float32_tflops=156,
    bfloat16_tflops=312,
    sources=(
        f"memory, HBM2, NVLink 3 (600 GB/s both ways), PCIe 4, dense TF32/BF16: {_A100}",
        f"DGX A100 320 GB: 1 TB host memory, eight 200 Gb/s network cards: {_DGX_A100}",
    ),
)
_H100_SXM = Hardware(
    name="h100",
    device="cuda",
    ranks_per_host=8,
    memory_gib=80,
    host_memory_gib=256,
    memory_gb_s=3350,
    host_to_device_gb_s=64,
    intra_host_gb_s=450,
    inter_host_gb_s=50,
    float32_tflops=494,
    bfloat16_tflops=989,
    sources=(
        f"H100 SXM: memory, HBM3, NVLink 4 (900 GB/s both ways), PCIe 5: {_H100}",
        "TF32/BF16 without sparsity: half of the data sheet's figures",
        f"DGX H100: 2 TB host memory, eight 400 Gb/s network cards: {_DGX_H100}",
    ),
)

PRESETS: Mapping[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        _A100_40_GB,
        replace(
            _A100_40_GB,
            name="a100-80",
            memory_gib=80,
            host_memory_gib=256,
            memory_gb_s=2039,
            sources=(
                f"memory, HBM2e, NVLink 3 (600 GB/s both ways), PCIe 4, dense TF32/BF16: {_A100}",
                f"DGX A100 640 GB: 2 TB host memory, eight 200 Gb/s network cards: {_DGX_A100}",
            ),
        ),
        _H100_SXM,
        replace(
            _H100_SXM,
            name="h200",
            memory_gib=140,
            memory_gb_s=4800,
            sources=(
                f"H200 SXM: 141 GB HBM3e, NVLink 4 (900 GB/s both ways), PCIe 5: {_H200}; "
                "nvidia-smi reports 143,771 MiB, which are 140 GiB",
                f"network cards and host memory as DGX H100: {_DGX_H100}",
            ),
        ),
        Hardware(
            name="b200",
            device="cuda",
            ranks_per_host=8,
            memory_gib=179,
            host_memory_gib=256,
            memory_gb_s=7672,
            host_to_device_gb_s=64,
            intra_host_gb_s=900,
            inter_host_gb_s=50,
            float32_tflops=1100,
            bfloat16_tflops=2250,
            sources=(
                f"HGX B200: NVLink 5 (1.8 TB/s both ways), dense TF32/BF16: {_B200}",
                "memory: nvidia-smi reports 183,359 MiB, which are 179 GiB; its bandwidth: the "
                "driver reports a bus of 7680 bits at 3996 MHz, twice a cycle, 7.67 TB/s where the "
                f"data sheet has 8: {_B200_BUS}",
                "DGX B200: 2 TB host memory, eight 400 Gb/s network cards, PCIe 5 hosts: "
                f"{_DGX_B200}",
            ),
        ),
        Hardware(
            name="cpu",
            device="cpu",
            ranks_per_host=2,
            memory_gib=512,
            host_memory_gib=512,
            memory_gb_s=307,
            host_to_device_gb_s=307,
            intra_host_gb_s=20,
            inter_host_gb_s=12.5,
            float32_tflops=7.2,
            bfloat16_tflops=229,
            sources=(
                "one rank per socket of a two-socket server, 512 GiB a socket",
                f"Xeon Platinum 8480+: 56 cores at 2 GHz, AVX-512, AMX, 8 DDR5 channels: {_XEON}",
                "between sockets (gloo) and a 200 Gb/s network card for both: assumptions",
            ),
        ),
    )
}
"""Value of `--gpu` → machine."""


def preset(name: str) -> Hardware:
    """Returns the preset called `name`, in upper or lower case.

    Raises:
        OptionError: there is no such preset.
    """
    try:
        return PRESETS[name.lower()]
    except KeyError:
        raise OptionError(
            f"there is no GPU {name!r}; use {', '.join(PRESETS)}, or `hardware` FILE"
        ) from None


def read_hardware(path: Path | str) -> Hardware:
    """Reads a machine from a YAML file: the fields of `Hardware`, or `base: <preset>` and the
    fields that differ.

    Raises:
        PlanError: the file is not valid; the sentence names the file and the field.
    """
    values = load_yaml(Path(path))
    if not isinstance(values, dict):
        raise PlanError(f"{path} must be a mapping of the fields of a machine")
    base = values.pop("base", None)
    known = [field.name for field in fields(Hardware)]
    for name in values:
        if name not in known:
            raise PlanError(f"{path}: unknown field {name!r}; use base, {', '.join(known)}")
    if base is not None:
        if not isinstance(base, str) or base.lower() not in PRESETS:
            raise PlanError(f"{path}: base {base!r} is none of {', '.join(PRESETS)}")
        own = {"name": Path(path).stem, "sources": []}
        values = PRESETS[base.lower()].to_dict() | own | values
    return checked(values, Hardware, str(path))


def write_hardware(hardware: Hardware, path: Path | str) -> None:
    """Writes a machine to a file for `read_hardware` and `--hardware`."""
    text = yaml.safe_dump(hardware.to_dict(), sort_keys=False, allow_unicode=True, width=100)
    Path(path).write_text(text, encoding="utf-8")
