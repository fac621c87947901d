"""A build that is built again: recorded, pinned, replayed; and what differs is shown."""

import json
import sys

import pytest

from tasks.engines.trt_replay import layer_row
from tasks.errors import BackendError
from tests.unit.tasks.small_graphs import cnn

pytestmark = pytest.mark.gpu


@pytest.mark.timeout(400)
def test_what_one_build_recorded_another_repeats(compiler):
    result, output = compiler(cnn(), reproducible=True)
    files = {
        "timing.cache": (output / "timing.cache").read_bytes(),
        "expected-layers.json": (output / "layers.json").read_bytes(),
    }
    try:
        again, _output = compiler(cnn(), reproducible=True, timing_cache="pinned", files=files)
    except BackendError as err:
        if err.kind == "version mismatch" and "does not take the pinned timing cache" in err.message:
            pytest.skip(f"this TensorRT refuses what it wrote: {err.message}")
        raise
    assert again.facts["timing_cache"]["used"] is True
    assert again.facts["layers"]["count"] == result.facts["layers"]["count"]
    sys.stdout.write(json.dumps([result.facts["seconds"], again.facts["seconds"], again.facts["timing_cache"]]) + "\n")


@pytest.mark.timeout(400)
def test_layers_that_are_not_those_of_the_pinned_listing_are_shown(compiler):
    _result, output = compiler(cnn())
    listing = json.loads((output / "layers.json").read_text())
    first = listing["Layers"][0]
    assert isinstance(first, dict)  # told in detail, or tactics could not be compared
    assert any(layer.get("TacticName") or layer.get("TacticValue") for layer in listing["Layers"])
    listing["Layers"][0] = {**first, "TacticName": "another tactic"}
    with pytest.raises(BackendError) as caught:
        compiler(cnn(), files={"expected-layers.json": json.dumps(listing).encode()})
    assert caught.value.kind == "not reproducible"
    assert f"-{layer_row(listing['Layers'][0])}" in caught.value.message
    sys.stdout.write(f"{caught.value}\n")
