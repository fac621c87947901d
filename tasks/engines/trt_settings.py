"""Builder settings: every one is set, read back, and refused aloud where TensorRT does not take it as asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from tasks.engines.trt_adapter import adapter, named
from tasks.engines.trt_log import Log
from tasks.errors import BackendError

_HARDWARE: Final = {"none": "NONE", "ampere+": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}
# Flags that a recipe may ask for, by parameter.
_FLAGS: Final = {
    "version_compatible": "VERSION_COMPATIBLE",
    "sparse_weights": "SPARSE_WEIGHTS",
    "weight_streaming": "WEIGHT_STREAMING",
}

# build.refit: what each way of it sets.
_REFIT: Final = {"none": (), "weights": ("REFIT",), "stripped": ("REFIT", "STRIP_PLAN")}


class Settings:
    """Applies parameters to one builder configuration; `applied` says what was set and read back, as JSON."""

    def __init__(self, trt: Any, log: Log, config: Any) -> None:
        self._trt, self._log, self._config = trt, log, config
        self.applied: dict[str, Any] = {}

    def apply(self, params: Mapping[str, Any], network: Any, graph: Path) -> None:
        """Set everything but the workspace; `network` was parsed from `graph`. Raises BackendError("rejected setting" | "version mismatch")."""
        self.flag("TF32", on=bool(params["tf32"]))
        for name, flag in _FLAGS.items():
            if params.get(name):
                self.flag(flag)
        for flag in _REFIT[params.get("refit", "none")]:
            self.flag(flag)
        for flag in adapter(self._trt).type_flags(self._trt, network, graph):
            self.flag(flag)
        if params.get("optimization_level") is not None:
            self.attribute("builder_optimization_level", params["optimization_level"])
        if params.get("max_aux_streams") is not None:
            self.attribute("max_aux_streams", params["max_aux_streams"])
        level = params.get("hardware_compatibility") or "none"
        if level != "none":
            if level not in _HARDWARE:
                raise BackendError(
                    "rejected setting",
                    f"no hardware compatibility {level!r} (allowed: {', '.join(_HARDWARE)})",
                    "correct build.hardware_compatibility in the recipe",
                )
            self.attribute(
                "hardware_compatibility_level", named(self._trt, "HardwareCompatibilityLevel", _HARDWARE[level])
            )
        if params.get("tactic_sources") is not None:
            self._tactic_sources(params["tactic_sources"])
        # So that the inspector names tactics: what a rebuild chose can be compared, at the cost of some text in the plan.
        self.attribute("profiling_verbosity", named(self._trt, "ProfilingVerbosity", "DETAILED"))

    def flag(self, name: str, *, on: bool = True) -> None:
        """Set or clear a BuilderFlag by name; clearing one that a version lacks needs nothing."""
        if not on and not hasattr(self._trt.BuilderFlag, name):
            return
        flag = named(self._trt, "BuilderFlag", name)

        def change() -> None:
            (self._config.set_flag if on else self._config.clear_flag)(flag)

        self._checked(name, change, lambda: bool(self._config.get_flag(flag)), wanted=on)

    def attribute(self, name: str, value: Any) -> None:
        """Set a property of the configuration."""
        if not hasattr(self._config, name):
            raise BackendError(
                "version mismatch",
                f"TensorRT {self._trt.__version__} has no {name}",
                "build with another version of TensorRT, or leave this option out",
            )
        self._checked(
            name, lambda: setattr(self._config, name, value), lambda: getattr(self._config, name), wanted=value
        )

    def workspace(self, limit: int | None) -> int:
        """Limit scratch memory, in bytes, unless it is None; return the limit in force."""
        pool = named(self._trt, "MemoryPoolType", "WORKSPACE")
        if limit is not None:
            self._checked(
                "workspace",
                lambda: self._config.set_memory_pool_limit(pool, limit),
                lambda: int(self._config.get_memory_pool_limit(pool)),
                wanted=limit,
            )
        return int(self._config.get_memory_pool_limit(pool))

    def _tactic_sources(self, names: list[str]) -> None:
        mask = sum(1 << int(named(self._trt, "TacticSource", name)) for name in names)
        self._checked(
            "tactic_sources",
            lambda: self._config.set_tactic_sources(mask),
            lambda: int(self._config.get_tactic_sources()),
            wanted=mask,
        )

    def _checked(self, name: str, change: Callable[[], object], read: Callable[[], Any], *, wanted: Any) -> None:
        before = len(self._log.errors)
        try:
            change()
        except (TypeError, ValueError, RuntimeError) as err:
            raise self._rejected(name, wanted, str(err)) from err
        found, said = read(), self._log.errors[before:]
        if said or found != wanted:
            raise self._rejected(name, wanted, "; ".join(said) or f"it stays {_shown(found)}")
        self.applied[name] = _shown(found)

    def _rejected(self, name: str, wanted: Any, words: str) -> BackendError:
        return BackendError(
            "rejected setting",
            f"TensorRT {self._trt.__version__} does not take {name} = {_shown(wanted)}: {words}",
            "change this option under `build` in the recipe, or leave it out",
        )


def _shown(value: Any) -> Any:
    """Return a value as JSON; members of enumerations by their names."""
    return value if isinstance(value, (bool, int, float, str)) and not hasattr(value, "name") else value.name
