"""Clusters: what a GPU can do, how many share a domain of fast links, and the network between domains."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helix_megatron.checkpoint.foreign import read_bytes
from helix_megatron.errors import HelixError, did_you_mean, listed
from helix_megatron.flags import LONGEST_NAME, Number, one_line, real, whole
from helix_megatron.hardware import (
    CHIPS,
    HDR,
    HDR_HALF,
    HOST_SECONDS,
    LOOPBACK,
    NDR,
    NDR_HALF,
    NVLINK3,
    NVLINK4,
    NVLINK5,
    PCIE4,
    PCIE5,
    Chip,
)


@dataclass(frozen=True, eq=False)  # hashed by identity, thousands of times
class Cluster:
    """Domains of GPUs joined by a network.

    domain: GPUs that share fast links (a node, or an NVLink domain of several). domain_bandwidth and
    network_bandwidth: byte/s of one GPU in one direction. gpus: how many there are; None for as many as are
    asked for. host_seconds: that a rank's process takes to launch an operator.
    """

    name: str
    chip: Chip
    domain: int
    domain_link: str
    domain_bandwidth: float
    network_link: str
    network_bandwidth: float
    source: str
    gpus: int | None = None
    host_seconds: float = HOST_SECONDS

    def __post_init__(self) -> None:
        if self.domain < 1:
            raise HelixError(f"cluster {self.name}: domain {self.domain} must be at least 1 GPU.")
        for name in ("domain_bandwidth", "network_bandwidth"):
            if not getattr(self, name) > 0:
                raise HelixError(
                    f"cluster {self.name}: {name} is {getattr(self, name)!r}. It must be above 0, in bytes "
                    "per second of one GPU, such as 50e9."
                )

    def used_domain(self, gpus: int) -> int:
        """How many GPUs of a domain a job of so many takes.

        All, or where these do not divide it the most in eights that do: 256 on racks of 72 take 64 of each.
        """
        if gpus <= self.domain or self.domain % 8 or gpus % self.domain == 0:
            return self.domain
        return max((d for d in range(8, self.domain + 1, 8) if gpus % d == 0), default=self.domain)


H100, H200, A100 = CHIPS["h100"], CHIPS["h200"], CHIPS["a100"]
VTRAIN = "as in vTrain (arXiv 2312.12391)"
UNBRIDGED = "without bridges, 4 NICs of 400 Gbit/s"

CLUSTERS = {
    cluster.name: cluster
    for cluster in (
        Cluster("dgx-h100", H100, 8, *NVLINK4, *NDR, "DGX H100: 8 GPUs, 8 NICs of 400 Gbit/s"),
        Cluster("dgx-h200", H200, 8, *NVLINK4, *NDR, "DGX H200: 8 GPUs, 8 NICs of 400 Gbit/s"),
        Cluster(
            "dgx-b200", CHIPS["b200"], 8, *NVLINK5, *NDR, "DGX B200: 8 GPUs, 8 NICs of 400 Gbit/s"
        ),
        Cluster("dgx-a100", A100, 8, *NVLINK3, *HDR, "DGX A100 80GB: 8 GPUs, 8 NICs of 200 Gbit/s"),
        Cluster(
            "a100-4-nics", A100, 8, *NVLINK3, *HDR_HALF, f"8 A100 and 800 Gbit/s a node, {VTRAIN}"
        ),
        Cluster("nvlink-16", H100, 16, *NVLINK4, *NDR, "16 H100 in one NVLink Switch domain"),
        Cluster("nvlink-32", H100, 32, *NVLINK4, *NDR, "32 H100 in one NVLink Switch domain"),
        Cluster("nvlink-72", CHIPS["gb200"], 72, *NVLINK5, *NDR, "GB200 NVL72: 72 GPUs a rack"),
        Cluster("h100-pcie", CHIPS["h100-pcie"], 8, *PCIE5, *NDR_HALF, f"8 H100 PCIe {UNBRIDGED}"),
    )
}
LOCAL = "this-machine"
# Links of the GPUs that are known by nvidia-smi's name for them.
LOCAL_LINKS = {
    "a100": NVLINK3,
    "a100-pcie": PCIE4,
    "h100": NVLINK4,
    "h100-pcie": PCIE5,
    "h200": NVLINK4,
    "gb200": NVLINK5,
    "b200": NVLINK5,
}

# What a number of a file may be, beyond all machines there are: with any of them costs stay finite.
RATE = real(at_least=1e3, at_most=1e18)  # bytes per second
BYTES = real(at_least=1e6, at_most=1e18)
FLOPS = real(at_least=1e6, at_most=1e21)
SHARE = real(at_least=1e-3, at_most=1)
FIELDS: dict[str, Callable[[str], Any] | None] = {
    "name": one_line,
    "chip": None,  # a name, or a mapping
    "gpus_per_domain": whole(largest=10**6),
    "domain_link": one_line,
    "domain_bandwidth": RATE,
    "network_link": one_line,
    "network_bandwidth": RATE,
    "gpus": whole(largest=10**6),
    "host_seconds": real(at_least=0, at_most=1),
}
CHIP_NUMBERS = {"memory": BYTES, "memory_bandwidth": RATE, "units": whole(largest=10**6)}
MOST_YAML, DEEPEST = 1 << 16, 4  # bytes, and mappings inside each other, of a file
CHIP_FIELDS = ("name", "flops", "memory", "memory_bandwidth", "units", "sustained")
OPTIONAL = {"name", "domain_link", "network_link", "gpus", "host_seconds"}
EXAMPLE = (
    "chip: h100, gpus_per_domain: 8, domain_bandwidth: 450e9, network_bandwidth: 50e9 "
    "(bytes per second of one GPU, in one direction)"
)


def cluster_of(text: str) -> Cluster:
    """A preset, `this-machine`, or a YAML file.

    Raises:
        HelixError: neither; or a file with unknown, missing or impossible entries.
    """
    if text in CLUSTERS:
        return CLUSTERS[text]
    if text == LOCAL:
        return local_cluster()
    path = Path(text)
    if path.suffix in (".yaml", ".yml", ".json") or path.exists():
        return read_cluster(path)
    names = [*CLUSTERS, LOCAL]
    raise HelixError(
        f"cluster {text!r} is no preset and no YAML file. Presets: {listed(names)}. A file holds {EXAMPLE}.",
        remedy=did_you_mean(text, names),
    )


def read_cluster(path: Path) -> Cluster:
    """A cluster from a YAML file.

    Raises:
        HelixError: it cannot be read, or has an entry that does not fit; names the nearest valid one.
    """
    content = _read_yaml(path)
    if not isinstance(content, Mapping):
        raise HelixError(f"cluster file {path} must be a mapping such as {EXAMPLE}.")
    _check_keys(path, content, tuple(FIELDS), OPTIONAL)
    values = {
        key: _value(path, key, content[key], read)
        for key, read in FIELDS.items()
        if read is not None and key in content
    }
    return Cluster(
        name=values.get("name", path.stem),
        chip=_chip(path, content["chip"]),
        domain=values["gpus_per_domain"],
        domain_link=values.get("domain_link", "domain link"),
        domain_bandwidth=values["domain_bandwidth"],
        network_link=values.get("network_link", "network"),
        network_bandwidth=values["network_bandwidth"],
        source=str(path),
        gpus=values.get("gpus"),
        host_seconds=values.get("host_seconds", HOST_SECONDS),
    )


def _read_yaml(path: Path) -> Any:
    """Mappings, lists and texts. Types belong to the fields: to YAML 1.1, 450e9 is a text and no is false."""
    import yaml

    text = read_bytes(path, MOST_YAML, f"A cluster file holds {EXAMPLE}.")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.BaseLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST or isinstance(event, yaml.AliasEvent):
                what = "aliases" if depth <= DEEPEST else f"more than {DEEPEST} levels"
                raise HelixError(f"cluster file {path} has {what}. A valid file: {EXAMPLE}.")
        return yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise HelixError(f"cluster file {path} is not YAML: {line}.") from error


def _value(path: Path, key: str, value: Any, read: Callable[[str], Any]) -> Any:
    """The value of an entry, which must be a text that `read` takes."""
    try:
        if isinstance(value, str):
            return read(value)
        problem = "is a list or a mapping. It must be a single value."
    except argparse.ArgumentTypeError as error:
        problem = str(error)
    raise HelixError(f"{path}: {key} {problem} A valid file: {EXAMPLE}.")


def _chip(path: Path, value: Any) -> Chip:
    if not isinstance(value, Mapping):
        if not isinstance(value, str) or value not in CHIPS:
            valid = f"{listed(CHIPS)}, or a mapping of {listed(CHIP_FIELDS)}"
            problem = f"{path}: chip {value!r:.200} is unknown. Valid: {valid}."
            raise HelixError(problem, remedy=did_you_mean(str(value)[:LONGEST_NAME], CHIPS))
        return CHIPS[value]
    _check_keys(path, value, CHIP_FIELDS, {"name", "sustained"}, "chip.")
    flops = _rates(path, "chip.flops", value["flops"], FLOPS)
    default = dict.fromkeys(flops, 0.85)
    sustained = (
        _rates(path, "chip.sustained", value["sustained"], SHARE) if "sustained" in value else {}
    )
    numbers = {
        key: _value(path, f"chip.{key}", value[key], read) for key, read in CHIP_NUMBERS.items()
    }
    name = _value(path, "chip.name", value.get("name", "custom"), one_line)
    return Chip(name=name, flops=flops, source=str(path), sustained=default | sustained, **numbers)


def _rates(path: Path, key: str, value: Any, read: Number) -> dict[str, float]:
    if not isinstance(value, Mapping) or not value or not set(value) <= {"bf16", "fp8", "fp32"}:
        raise HelixError(
            f"{path}: {key} is {value!r:.200}. It must be a mapping from bf16, fp8 or fp32 to a number."
        )
    return {name: _value(path, f"{key}.{name}", number, read) for name, number in value.items()}


def _check_keys(
    path: Path, content: Mapping[Any, Any], valid: tuple[str, ...], optional: set[str], at: str = ""
) -> None:
    for key in content:
        if key not in valid:
            problem = f"{path}: unknown entry {at}{key!s:.200}."
            raise HelixError(problem, valid=valid, remedy=did_you_mean(key[:LONGEST_NAME], valid))
    missing = [key for key in valid if key not in optional and key not in content]
    if missing:
        raise HelixError(f"{path}: {at}{missing[0]} is missing. A valid file: {EXAMPLE}.")


def local_cluster() -> Cluster:
    """This machine: its GPUs by nvidia-smi where there is one, else its CPU cores as ranks over loopback.

    Raises:
        HelixError: GPUs that are unknown here, of several kinds, or of unknown memory.
    """
    found = _nvidia_smi()
    if found:
        return _local_gpus(found)
    cores = os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    chip = dataclasses.replace(CHIPS["cpu"], memory=memory / cores)
    # Operators of a CPU are the host's own time (`Chip.launch`).
    return Cluster(LOCAL, chip, cores, *LOOPBACK, *LOOPBACK, chip.source, host_seconds=0.0)


def _local_gpus(found: list[tuple[str, str]]) -> Cluster:
    names = sorted({name for name, _ in found})
    file = f"Describe it in a YAML file for --cluster: {EXAMPLE}."
    if len(names) > 1:
        raise HelixError(f"{LOCAL} has GPUs of several kinds, {listed(names)}. {file}")
    words = set(re.split(r"[^a-z0-9]+", names[0].lower()))
    known = [key for key in LOCAL_LINKS if words.issuperset(key.split("-"))]
    if not known:
        raise HelixError(
            f"{LOCAL} has {names[0]!r}, which is unknown. Known: {listed(LOCAL_LINKS)}. {file}"
        )
    for _, memory in found:
        if not memory.isdecimal():
            problem = f"nvidia-smi gives {memory!r} as the memory of {names[0]!r}, not MiB"
            raise HelixError(f"{LOCAL}: {problem}. {file}")
    key = max(known, key=len)
    chip = CHIPS[key.removesuffix("-pcie") if key not in CHIPS else key]
    chip = dataclasses.replace(chip, memory=min(int(memory) for _, memory in found) * 2.0**20)
    return Cluster(LOCAL, chip, len(found), *LOCAL_LINKS[key], *NDR, "nvidia-smi", gpus=len(found))


def _nvidia_smi() -> list[tuple[str, str]]:
    """(name, MiB of memory) of every GPU here, as nvidia-smi prints them; nothing without the program."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(",", 1) for line in run.stdout.splitlines() if "," in line]
    return [(name.strip(), memory.strip()) for name, memory in rows]
