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

# 8.6 has this on by default, and then never calls these libraries, whatever the tactic sources are.
_NO_EXTERNAL: Final = "DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805"
_EXTERNAL: Final = frozenset(("cublas", "cublas-lt", "cudnn"))


class Settings:
    """Applies parameters to one builder configuration; `applied` says what was set and read back, as JSON."""

    def __init__(self, trt: Any, log: Log, config: Any) -> None:
        self._trt, self._log, self._config = trt, log, config
        self.applied: dict[str, Any] = {}

    def apply(self, params: Mapping[str, Any], builder: Any, network: Any, graph: Path) -> None:
        """Set everything but the workspace; `network` was parsed from `graph`.

        Raises BackendError: "rejected setting", "version mismatch", and "no device" for an accelerator that is not here.
        """
        self.flag("TF32", on=bool(params["tf32"]))
        for name, flag in _FLAGS.items():
            if params.get(name):
                self.flag(flag)
        for flag in _REFIT[params.get("refit", "none")]:
            self.flag(flag)
        chosen = adapter(self._trt, params.get("typing", "strong"))
        for flag in chosen.type_flags(self._trt, network, graph, params):
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
        if params.get("dla") is not None:
            self._dla(params["dla"], builder)
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

    def _dla(self, dla: Mapping[str, Any], builder: Any) -> None:
        if builder.num_DLA_cores <= dla["core"]:
            raise BackendError(
                "no device",
                f"there is no DLA core {dla['core']} here (cores: {builder.num_DLA_cores})",
                "build on a Jetson that has one, or leave build.dla out",
            )
        self.attribute("default_device_type", named(self._trt, "DeviceType", "DLA"))
        self.attribute("DLA_core", dla["core"])
        self.flag("GPU_FALLBACK", on=dla["gpu_fallback"])

    def _tactic_sources(self, names: list[str]) -> None:
        sources = {name: named(self._trt, "TacticSource", name.upper().replace("-", "_")) for name in names}
        mask = sum(1 << int(source) for source in sources.values())
        switch = getattr(getattr(self._trt, "PreviewFeature", None), _NO_EXTERNAL, None)
        if switch is not None and _EXTERNAL.intersection(names):
            self._checked(
                _NO_EXTERNAL,
                lambda: self._config.set_preview_feature(switch, False),
                lambda: bool(self._config.get_preview_feature(switch)),
                wanted=False,
            )
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
