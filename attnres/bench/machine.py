"""Facts about the machine and the installed packages, recorded with the results."""

import os
import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import __version__

PACKAGES = ("torch", "transformers", "numpy", "numba", "triton", "flash-linear-attention", "fla-core")


def describe(device: torch.device) -> dict:
    """Returns machine, versions and number of threads, for the results."""
    versions = {"python": platform.python_version(), "attnres": __version__}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    found = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "logical_cpus": os.cpu_count(),
        "usable_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "device": str(device),
        "versions": versions,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        versions["cuda"] = torch.version.cuda
    return found


def load_average() -> float:
    """Returns the load average of the last minute."""
    return round(os.getloadavg()[0], 2)


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or "unknown"
