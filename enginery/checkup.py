"""What `enginery doctor` checks: the core by importing it, extras by their versions, tools and devices by asking.

The core's packages and pins are read from the installed distribution's own metadata, so that the
doctor cannot disagree with what was installed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Final

from tasks.toolchain import probe_host, version

_IMPORT_SECONDS: Final = 120.0

# Where a distribution's import name is another.
_MODULES: Final = {"pyyaml": "yaml"}
_CORE_PURPOSE: Final = {
    "fastapi": "Prefect's server starts only with the versions that are pinned",
    "sqlalchemy": "Prefect's scheduler fails with 2.1",
    "prefect": "flows and their interface",
    "onnx": "graphs",
    "onnxruntime": "verifying graphs, and the onnxruntime target",
}
# What extras add: distribution, what for, how to get it.
_EXTRAS: Final = (
    ("torch", "recipes with a PyTorch source", "pip install 'enginery[torch]'"),
    ("onnxscript", "PyTorch's dynamo exporter", "pip install 'enginery[torch]'"),
    ("transformers", "recipes that build a transformers architecture", "pip install 'enginery[transformers]'"),
    ("onnxsim", "export.simplifier: onnxsim", "pip install 'enginery[onnxsim]'"),
    ("onnxslim", "export.simplifier: onnxslim", "pip install 'enginery[onnxslim]'"),
    ("tensorrt_rtx", "targets of tensorrt-rtx, built without a GPU", "pip install 'enginery[tensorrt-rtx]'"),
    ("boto3", "stores in S3", "pip install 'enginery[s3]'"),
    ("model-signing", "signing engines, checking signatures", "pip install 'enginery[sign]'"),
    ("pillow", "calibration on folders of images", "pip install 'enginery[images]'"),
    ("rapidfuzz", "the metric cer", "pip install 'enginery[metrics]'"),
    ("pycocotools", "the metric map", "pip install 'enginery[metrics]'"),
    ("nvidia-ml-py", "seeing this host's GPUs", "pip install nvidia-ml-py"),
)


@dataclass(frozen=True)
class Check:
    """One thing that is there or not: `found` is its version or what is wrong; `advice` is the next step."""

    name: str
    ok: bool
    found: str
    purpose: str
    advice: str
    core: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the check as JSON values."""
        return asdict(self)


def check_all() -> list[Check]:
    """Check Python, the core, the extras, git and the GPU."""
    return [_python(), *_core(), *(_extra(*extra) for extra in _EXTRAS), _git(), _gpu()]


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    # Asked of the running interpreter, whatever the metadata allowed when it was installed.
    supported = tuple(sys.version_info[:2]) >= (3, 10)
    return Check("python", supported, found, "everything", "install Python 3.10 or newer", core=True)


def _core() -> list[Check]:
    advice = "pip install --force-reinstall enginery"
    try:
        from packaging.requirements import Requirement

        texts = metadata.requires("enginery") or []
        needed = [
            need for need in map(Requirement, texts) if need.marker is None or need.marker.evaluate({"extra": ""})
        ]
    except (ImportError, metadata.PackageNotFoundError) as err:
        return [Check("enginery", ok=False, found=str(err), purpose="its own package", advice=advice, core=True)]
    failures = _import_failures([_MODULES.get(need.name, need.name) for need in needed])
    checks = []
    for need in needed:
        found = version(need.name)
        wrong = failures.get(_MODULES.get(need.name, need.name))
        pinned = found is not None and need.specifier.contains(found, prereleases=True)
        text = found or "not installed"
        if found is not None and not pinned:
            text = f"{found}, but {need.specifier} is needed"
        elif found is not None and wrong is not None:
            text = f"{found} does not import: {wrong}"
        fix = f"pip install '{need.name}{need.specifier}'"
        purpose = _CORE_PURPOSE.get(need.name, "core")
        checks.append(Check(need.name, pinned and wrong is None, text, purpose, fix, core=True))
    return checks


def _import_failures(modules: list[str]) -> dict[str, str]:
    """Import each module in one process of its own (a native library may end it); return what went wrong, by module."""
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    print(name, end=' ', flush=True)\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "        print('ok', flush=True)\n"
        "    except BaseException as err:\n"
        "        print(f'{type(err).__name__}: {err}'.splitlines()[0], flush=True)\n"
    )
    # -P: a file of the working directory must not pass for a package; before Python 3.11 there is no such option.
    safe = ["-P"] if sys.version_info >= (3, 11) else []
    try:
        done = subprocess.run(
            [sys.executable, *safe, "-W", "ignore", "-c", code, *modules],
            capture_output=True,
            check=False,
            text=True,
            timeout=_IMPORT_SECONDS,
        )
        lines, ended = done.stdout.splitlines(), f"the process ended with status {done.returncode}"
    except subprocess.TimeoutExpired as err:
        output = err.stdout or b""
        lines = (output.decode() if isinstance(output, bytes) else output).splitlines()
        ended = f"not within {_IMPORT_SECONDS:.0f} s"
    said = {name: what or ended for name, _space, what in (line.partition(" ") for line in lines)}
    return {name: said.get(name, f"not tried: {ended}") for name in modules if said.get(name) != "ok"}


def _extra(name: str, purpose: str, advice: str) -> Check:
    found = version(name)
    return Check(name, found is not None, found or "-", purpose, advice)


def _git() -> Check:
    path = shutil.which("git")
    return Check("git", path is not None, path or "-", "the commit in manifests", "install git")


def _gpu() -> Check:
    found = probe_host()
    names = ", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in found.gpus)
    return Check(
        "NVIDIA GPU",
        bool(found.gpus),
        names or "-",
        "executing TensorRT engines (building for tensorrt-rtx needs none)",
        "a host with an NVIDIA driver, and nvidia-ml-py",
    )
