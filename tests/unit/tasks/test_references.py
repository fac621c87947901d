"""What a parity reference says of its outputs: element types, and axes by the names of the inputs' axes."""

from __future__ import annotations

import numpy as np

from tasks.references import described_outputs, save_arrays

TENSORS = {
    "ids": {"dtype": "float32", "shape": ["batch", "length"]},
    "mask": {"dtype": "float32", "shape": ["batch", "length"]},
}


def test_axes_that_several_inputs_share_keep_their_names_in_the_outputs(tmp_path):
    arrays = {}
    for case, batch, length in (("online/max", 4, 9), ("online/min", 1, 3)):
        for name in TENSORS:
            arrays[f"{case}/in/{name}"] = np.zeros((batch, length), np.float32)
        arrays[f"{case}/out/states"] = np.zeros((batch, length, 8), np.float32)
        arrays[f"{case}/out/found"] = np.zeros((batch * 7,), np.int64)
    save_arrays(arrays, tmp_path / "reference.safetensors")
    assert described_outputs(tmp_path / "reference.safetensors", TENSORS) == {
        "states": {"dtype": "float32", "shape": ["batch", "length", 8]},
        "found": {"dtype": "int64", "shape": ["found.0"]},
    }
