"""Triton's configuration of a model, read as Triton reads it: with its own protobuf."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest


@cache
def _protobuf() -> Any:
    # Only this file of the client's package, which imports grpc as a whole.
    found = importlib.util.find_spec("tritonclient")
    if found is None:
        return None
    path = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def triton_config(text: str) -> dict[str, Any]:
    """Return a config.pbtxt as JSON values (64-bit numbers are strings there); skips where Triton's client is not installed."""
    module = _protobuf()
    if module is None:
        pytest.skip("tritonclient is not installed (pip install 'enginery[dev]'; it is for x86-64 alone)")
    from google.protobuf import json_format, text_format

    message = text_format.Parse(text, module.ModelConfig())
    return json_format.MessageToDict(message, preserving_proto_field_name=True)
