"""Looks at the machine: versions, memory, limits, clock, environment. Nothing here takes longer than reading a file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import struct
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from shoal.doctor.facts import Machine, Package

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
_NO_LIMIT = 1 << 60
"""Control groups write a number near 2^63 for "no limit"."""


def machine(environment: Mapping[str, str] = os.environ) -> Machine:
    memory = _meminfo()
    temp = Path(tempfile.gettempdir())
    threads = environment.get("OMP_NUM_THREADS", "")
    return Machine(
        system=platform.system(),
        python=(sys.version_info.major, sys.version_info.minor),
        bits=8 * struct.calcsize("P"),
        packages=packages(),
        memory_total=memory.get("MemTotal"),
        memory_available=memory.get("MemAvailable"),
        memory_limit=_memory_limit(),
        swap_used=memory["SwapTotal"] - memory["SwapFree"] if "SwapFree" in memory else None,
        cores=len(os.sched_getaffinity(0)),
        core_limit=_core_limit(),
        load=os.getloadavg()[0],
        threads_wanted=int(threads) if threads.isdigit() else None,
        governor=_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        huge_pages=_chosen(_text("/sys/kernel/mm/transparent_hugepage/enabled")),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        temp=str(temp),
        temp_free=free_bytes(temp) if os.access(temp, os.W_OK | os.X_OK) else None,
        clock_synchronised=_clock_synchronised(),
        proxies=tuple(name for name in _PROXIES if environment.get(name)),
        no_proxy=environment.get("NO_PROXY") or environment.get("no_proxy") or "",
        is_root=os.geteuid() == 0,
        core_dumps=resource.getrlimit(resource.RLIMIT_CORE)[0] != 0 and _cores_go_to_files(),
    )


def packages(distribution: str = "shoal") -> tuple[Package, ...]:
    """What the installed distribution says it needs, and what is there of it. Nothing of it is imported."""
    try:
        needs = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return ()
    found = []
    for line in needs:
        try:
            need = Requirement(line)
        except InvalidRequirement:
            continue
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(Package(need.name, str(need.specifier), None, False))
            continue
        # A local build ("2.13.0+cpu") is the version that was asked for.
        accepted = need.specifier.contains(version, prereleases=True)
        found.append(Package(need.name, str(need.specifier), version, accepted))
    return tuple(found)


def free_bytes(path: Path) -> int | None:
    """Room for this user on the disk that holds `path`, or would hold it."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def _meminfo() -> dict[str, int]:
    text = _text("/proc/meminfo") or ""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name: int(value.split()[0]) * 1024 for name, value in pairs if value.strip().endswith("kB")}


def _memory_limit() -> int | None:
    limits = []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _text(path)
        if text is not None and text.isdigit() and int(text) < _NO_LIMIT:
            limits.append(int(text))
    return min(limits, default=None)


def _core_limit() -> float | None:
    text = _text("/sys/fs/cgroup/cpu.max")
    if text is not None:
        quota, _, period = text.partition(" ")
        return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None
    quota_text, period_text = (
        _text("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"),
        _text("/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
    )
    if quota_text is None or period_text is None or not quota_text.isdigit() or not period_text.isdigit():
        return None
    return int(quota_text) / int(period_text)


def _clock_synchronised() -> bool | None:
    """What systemd's time service says; None on machines that keep time in another way."""
    if not Path("/run/systemd/timesync").is_dir():
        return None
    return Path("/run/systemd/timesync/synchronized").exists()


def _cores_go_to_files() -> bool:
    pattern = _text("/proc/sys/kernel/core_pattern")
    return pattern is not None and not pattern.startswith("|")


def _chosen(text: str | None) -> str | None:
    """The word in brackets: "always [madvise] never" says madvise."""
    if text is None or "[" not in text:
        return None
    return text.partition("[")[2].partition("]")[0]


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
