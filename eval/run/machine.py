"""The machine that a run is done on."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch

from hfsparse.version import __version__


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, threads: {torch.get_num_threads()}"


def describe(device: torch.device) -> dict[str, str]:
    """The machine and the versions behind results."""
    return {
        "machine": f"{device_name(device)}, {platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "hfsparse": __version__,
    }


def processor() -> str:
    """The CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
