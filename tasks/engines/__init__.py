"""Compilers: a typed ONNX graph becomes a plan for one runtime and one GPU.

Enters: `model.onnx` (+ `model.onnx.data`), the profiles and the build options. Leaves: the runtime's plan, checked
as far as this host can, and facts about it. Each backend is a function in a module of its own, named in `RUNTIMES` by
import string and imported only in the child process; backends import no sibling. What planning and the command line
need to know about a runtime is static and stands here.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Protocol

from artifacts.refs import ENGINE_PLAN, ONNX
from tasks.errors import BackendError
from tasks.stage import StageRequest, StageResult


class EngineBackend(Protocol):
    """Compiles one graph for one GPU. Called in a fresh process, once."""

    def __call__(self, request: StageRequest) -> StageResult:
        """Write the plan into `request.output_dir` and return its name and facts.

        Raises BackendError with the compiler's own words: nothing is compiled that ignores a setting of the recipe.
        """
        ...


@dataclass(frozen=True)
class Runtime:
    """A runtime that engines are compiled for: what is known of it without importing it.

    `package` is the name it is imported under, `extra` the extra of Enginery that installs it (None: a dependency),
    `entry` its `EngineBackend`.
    """

    name: str
    package: str
    extra: str | None
    entry: str
    plan_name: str
    media_type: str

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install 'enginery[{self.extra}]'" if self.extra is not None else f"pip install {self.package}"


RUNTIMES: Final[Mapping[str, Runtime]] = MappingProxyType(
    {
        runtime.name: runtime
        for runtime in (
            Runtime(
                "tensorrt-rtx",
                "tensorrt_rtx",
                "tensorrt-rtx",
                "tasks.engines.trt_rtx:compile_plan",
                "model.plan",
                ENGINE_PLAN,
            ),
            Runtime(
                "tensorrt",
                "tensorrt",
                "tensorrt",
                "tasks.engines.trt:compile_plan",
                "model.plan",
                ENGINE_PLAN,
            ),
            Runtime("onnxruntime", "onnxruntime", None, "tasks.engines.ort:compile_plan", "model.onnx", ONNX),
        )
    }
)


def run(request: StageRequest) -> StageResult:
    """Compile with the runtime that the parameters name.

    Raises BackendError("missing package") where the runtime is not installed, and as the backend does.
    """
    name = str(request.params["runtime"])
    runtime = RUNTIMES.get(name)
    if runtime is None:
        allowed = ", ".join(RUNTIMES)
        raise BackendError(
            "rejected setting", f"nothing compiles for {name!r} (allowed: {allowed})", "change targets[].runtime"
        )
    module, _, function = runtime.entry.partition(":")
    backend: EngineBackend = getattr(importlib.import_module(module), function)
    try:
        return backend(request)
    except ModuleNotFoundError as err:
        if err.name != runtime.package:
            raise
        raise BackendError("missing package", f"{runtime.package} is not installed here", runtime.install) from err
