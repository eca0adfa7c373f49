"""What a bug report needs: versions, the machine, its kernels, and whether a model can be patched.

    hfsparse doctor [MODEL]

A package that is missing or broken is a line of the report, never an error.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata, resources
from typing import Any

from hfsparse import families
from hfsparse.errors import Error, first_line
from hfsparse.models.loading import skeleton
from hfsparse.version import __version__

PACKAGES = ("torch", "transformers", "accelerate", "triton", "flash-attn-4")
TESTED = ("4.57.6", "5.0.0", "5.17.0", "5.24.0")  # of transformers
SUPPORTED = "4.57", "6"  # from, and below
VARIABLES = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


# Model types of tests/support, which write this file: docs/support.md.
FAMILIES = tuple(resources.files("hfsparse.cli").joinpath("families.txt").read_text().split())
NEEDS = {  # what a kernel may be asked for: (block or page lists, softcap or sink logits)
    "whole rows": (False, False),
    "lists": (True, False),
    "whole rows with softcap or sinks": (False, True),
    "lists with softcap or sinks": (True, True),
}


def report(model: str | None = None) -> dict[str, Any]:
    """Everything, as plain values. `model` is a folder or a hub name: its config is read."""
    found = {
        "versions": versions(),
        "transformers": _attempt(standing),
        "machine": machine(),
        "threads": _attempt(threads),
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "cuda": _attempt(cuda),
        "kernels": _attempt(kernels),
        "families": list(FAMILIES),
    }
    return found if model is None else {**found, "model": verdict(model)}


def versions() -> dict[str, str | None]:
    """Of hfsparse, Python and the packages that decide what runs; None: not installed."""
    found: dict[str, str | None] = {"hfsparse": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def standing(installed: str | None = None) -> str:
    """How a version of transformers (None: the installed one) stands to those that are tested."""
    from packaging.version import Version

    installed = installed or versions()["transformers"]
    if installed is None:
        return "not installed"
    version = Version(installed)
    first, end = map(Version, SUPPORTED)
    if not first <= version < end:
        return f"unsupported: install {SUPPORTED[0]} to {end.major - 1}.x"
    tested = [Version(number) for number in TESTED]
    if version in tested:
        return "tested"
    older = [number for number in tested if number < version]
    newer = [number for number in tested if number > version]
    if not newer:
        return f"newer than the newest tested, {older[-1]}"
    if not older:
        return f"older than the oldest tested, {newer[0]}"
    return f"untested, between {older[-1]} and {newer[0]}, which are"


def machine() -> dict[str, Any]:
    return {"os": platform.platform(), "cpu": _cpu(), "cores": os.cpu_count()}


def threads() -> int:
    import torch

    return torch.get_num_threads()


def cuda() -> dict[str, Any]:
    """CUDA devices, or why there are none."""
    import torch

    if not torch.cuda.is_available():
        return {"devices": [], "why_none": _why_no_cuda(torch)}
    devices = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"{device.major}.{device.minor}"
        gib = round(device.total_memory / 2**30, 1)
        devices.append({"name": device.name, "memory_gib": gib, "capability": capability})
    return {"devices": devices, "driver": _driver(), "toolkit": torch.version.cuda}


def kernels() -> dict[str, dict[str, dict[str, str | None]]]:
    """Each table's kernels: what each may be asked for, and why not (None: it runs)."""
    import torch

    from hfsparse.kernels import TABLES, Need
    from hfsparse.patterns import PATTERNS
    from hfsparse.selectors import SELECTORS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    need = Need(device, torch.bfloat16, 128, 128)
    attention = {
        words: need._replace(lists=lists, logits=logits) for words, (lists, logits) in NEEDS.items()
    }
    choosers = {**PATTERNS, **SELECTORS}
    chosen = {kind: need._replace(chooser=chooser()) for kind, chooser in choosers.items()}
    asked = {
        "prefill": attention,
        "decode": attention,
        "estimate": {kind: chosen[kind] for kind in PATTERNS},
        "select": {kind: chosen[kind] for kind in SELECTORS if hasattr(SELECTORS[kind], "pages")},
        "append": {"new tokens": need},
        "fetch": {"pages in host memory": need},
        "count": {"pairs": need},
    }
    return {
        name: {
            kernel.name: {words: kernel.why_not(need) for words, need in needs.items()}
            for kernel in getattr(TABLES, name)
        }
        for name, needs in asked.items()
    }


def verdict(name: str) -> dict[str, Any]:
    """Whether a model can be patched, from its config: it is built without weights."""
    found: dict[str, Any] = {"name": name, "supported": False}
    try:
        from hfsparse.models.classes import class_of
        from hfsparse.models.loading import load_config
        from hfsparse.patcher import patch
        from hfsparse.plan import ModelId

        config = load_config(name)
        named = getattr(class_of(config), "__name__", None)
        found["type"], found["tested"] = config.model_type, _tested(config.model_type, named)
        model = skeleton(config)
        with patch(model):
            shape = ModelId.of(model)
    except Exception as problem:  # whatever a config can do to transformers
        ours = isinstance(problem, Error)
        return {**found, "why_not": first_line(problem) if ours else _say(problem)}
    found["shape"] = f"{shape.class_name}, {shape.sizes}, {shape.fingerprint}"
    return {**found, "supported": True}


def _tested(model_type: str, class_name: str | None) -> str:
    """How well a family is known, in words with their page."""
    if model_type in FAMILIES:
        return "tested in every way of use: docs/support.md"
    return f"census, {families.PAGE}: {families.verdict(model_type, class_name)}"


def text(found: dict[str, Any]) -> str:
    """The report for people, a line a fact."""
    facts = [(name, version or "not installed") for name, version in found["versions"].items()]
    tested = f"transformers {', '.join(TESTED)}; this one is {_plain(found['transformers'])}"
    facts.append(("tested", tested))
    facts.append(("os", found["machine"]["os"]))
    facts.append(("cpu", f"{found['machine']['cpu']}, {found['machine']['cores']} cores"))
    facts.append(("threads", _plain(found["threads"])))
    facts += [(name, value or "not set") for name, value in found["environment"].items()]
    facts += [("cuda", line) for line in _devices(found["cuda"])]
    if "error" in found["kernels"]:
        facts.append(("kernels", _plain(found["kernels"])))
    else:
        for table, rows in found["kernels"].items():
            facts += [(table, f"{name}: {_served(why)}") for name, why in rows.items()]
    facts.append(("families", f"{', '.join(found['families'])} are tested"))
    facts += [("model", line) for line in _judged(found.get("model"))]
    width = max(len(name) for name, _ in facts)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts)


def _devices(found: dict[str, Any]) -> list[str]:
    if not found.get("devices"):
        return [f"no device: {found.get('why_none') or _plain(found)}"]
    about = f"driver {found['driver'] or 'unknown'}, CUDA {found['toolkit']}"
    return [
        f"{device['name']}, {device['memory_gib']} GiB, capability {device['capability']}, {about}"
        for device in found["devices"]
    ]


def _judged(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    name = found["name"] + (f" ({found['tested']})" if "tested" in found else "")
    if found["supported"]:
        return [f"{name}: can be patched", found["shape"]]
    return [f"{name}: can't be patched", found["why_not"]]


def _served(why: dict[str, str | None]) -> str:
    """What a kernel runs, and the reasons why it doesn't run the rest."""
    served = [need for need, reason in why.items() if reason is None]
    reasons = list(dict.fromkeys(reason for reason in why.values() if reason is not None))
    if not reasons:
        return "runs"
    return f"{'runs ' + ', '.join(served) if served else 'does not run'} ({'; '.join(reasons)})"


def _attempt(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except Exception as problem:  # a broken package can raise anything when it is imported
        return {"error": _say(problem)}


def _say(problem: Exception) -> str:
    return f"{type(problem).__name__}: {first_line(problem)}"


def _plain(value: Any) -> str:
    return str(value["error"] if isinstance(value, dict) else value)


def _why_no_cuda(torch) -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except Exception as problem:
        return first_line(problem)
    return "torch finds none"


def _driver() -> str | None:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(answer.stdout.split()), None)


def _cpu() -> str:
    """The processor's name; Linux has it in a file of its own."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()
