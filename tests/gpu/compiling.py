"""The compile stage on the GPU that is here, as a build runs it: in a process of its own."""

import sys

import numpy as np
import onnx
import pytest

from tasks.errors import BackendError
from tasks.process import Limits, run_stage

OPSET = 17  # what every version from 8.6 on reads
LIMITS = Limits(timeout_s=150, memory_bytes=64 << 30)
PROFILES = [
    {"name": "online", "inputs": {"x": {"min": [1, 1, 8, 8], "opt": [1, 1, 8, 8], "max": [4, 1, 16, 16]}}},
    {"name": "bulk", "inputs": {"x": {"min": [1, 1, 8, 8], "opt": [64, 1, 8, 8], "max": [128, 1, 8, 8]}}},
]
VECTOR = [{"name": "static", "inputs": {"x": {"min": [1, 4], "opt": [2, 4], "max": [8, 4]}}}]


def at_opset(model, opset=OPSET):
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", opset))
    return model


class Compiler:
    def __init__(self, gpu, folder):
        self.gpu, self.folder, self.count, self.progress = gpu, folder, 0, []

    def __call__(
        self, model, cache=None, *, keep_opset=False, files=None, stage="compile", limits=LIMITS, entry=None, **params
    ):
        self.count += 1
        folder = self.folder / str(self.count)
        output = folder / "out"
        output.mkdir(parents=True)
        (folder / "model.onnx").write_bytes((model if keep_opset else at_opset(model)).SerializeToString())
        inputs = {"model.onnx": folder / "model.onnx"}
        for name, data in {**({"timing.cache": cache} if cache is not None else {}), **(files or {})}.items():
            (folder / name).write_bytes(data)
            inputs[name] = folder / name
        asked = {
            "runtime": "tensorrt",
            "gpu": self.gpu,
            "precision": "fp32",
            "tf32": False,
            "profiles": PROFILES,
            "workspace": 256 << 20,
            "optimization_level": 1,  # these graphs are small, and the tests need not wait for the fastest kernels
            "hardware_compatibility": "none",
            "version_compatible": False,
        }
        result = run_stage(
            stage,
            asked | params,
            inputs,
            output,
            limits=limits,
            on_progress=lambda *said: self.progress.append(said),
            entry=entry,
        )
        return result, output

    def refuse(self, model, **params):
        with pytest.raises(BackendError) as caught:
            self(model, **params)
        assert str(self.folder) not in str(caught.value)
        sys.stdout.write(f"{caught.value}\n")
        return caught.value


def relative(expected, found):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)
