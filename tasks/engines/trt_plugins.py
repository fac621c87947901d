"""Libraries of TensorRT plugins: loaded only when their digest was named, and what they registered is said.

A library is code that runs with all rights of this process, so nothing but a file that the recipe (or the manifest) names by
its digest is loaded; who calls this has checked that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tasks.errors import BackendError

PREFIX: Final = "plugin-"
# What a library exports that leaves registering to the registry: 8.6 knows the first, 10 and later also the second.
_EXPORTS: Final = ("getPluginCreators", "getCreators")


def plugin_files(inputs: Mapping[str, Path]) -> list[Path]:
    """Return the libraries among a stage's inputs, in the order of their names."""
    return [inputs[name] for name in sorted(inputs) if name.startswith(PREFIX)]


def load_plugins(trt: Any, paths: Sequence[Path]) -> list[str]:
    """Load libraries of plugins; return the names that they registered, as "namespace::name version", sorted.

    A library registers when it is loaded (REGISTER_TENSORRT_PLUGIN), or exports its creators to the registry. Raises
    BackendError("missing plugin") for a file that cannot be loaded (with the loader's words) and for one that brings nothing.
    """
    if not paths:
        return []
    registry = trt.get_plugin_registry()
    if registry is None:
        raise BackendError("no device", f"TensorRT {trt.__version__} has no plugin registry here", "install it whole")
    brought: set[str] = set()
    for path in paths:
        before = creators(registry)
        try:
            library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError as err:
            words = str(err).replace(f"{path.parent}/", "")
            raise BackendError(
                "missing plugin",
                f"{path.name} cannot be loaded: {words}",
                "build the library for this system, CUDA and TensorRT, and install what it needs",
            ) from err
        new = creators(registry) - before
        if not new and any(hasattr(library, symbol) for symbol in _EXPORTS):
            registry.load_library(str(path))
            new = creators(registry) - before
        if not new:
            raise BackendError(
                "missing plugin",
                f"{path.name} registers no plugin with TensorRT {trt.__version__}",
                "name a library that registers its creators when it is loaded, or exports getPluginCreators or getCreators "
                "(and is built for this version)",
            )
        brought |= new
    return sorted(brought)


def creators(registry: Any) -> set[str]:
    """Return what a registry knows; 8.6 lists creators of one kind, 10 and later those of all."""
    found = registry.all_creators if hasattr(registry, "all_creators") else registry.plugin_creator_list
    return {f"{creator.plugin_namespace}::{creator.name} {creator.plugin_version}" for creator in found}
