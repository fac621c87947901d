"""PyTorch timed on the GPU by the harness that times engines. It needs PyTorch and no TensorRT."""

import sys

import numpy as np
import pytest

pytestmark = pytest.mark.gpu


def test_torch_is_timed_on_the_gpu_in_every_way():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    from tasks.benchmark.measure import Rule, measure
    from tasks.benchmark.torch_candidate import TorchCandidate

    for half, compiled in ((False, False), (True, False), (True, True)):
        candidate = TorchCandidate(torch.nn.Linear(8, 8).eval(), gpu=True, half=half, compiled=compiled)
        found = measure(candidate, {"x": np.ones((4, 8), np.float32)}, 4, Rule(seconds=0.2))
        assert found["device_ms"]["p50"] > 0
        assert found["copy_share"] >= 0
        sys.stdout.write(f"half {half}, compiled {compiled}: {found['device_ms']}\n")
