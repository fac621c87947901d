"""This host's GPUs, as NVML, the probe of CUDA and cuda-bindings tell them: all three agree."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from artifacts.host import DEVICE_FACTS

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]


def asked(folder, **variables):
    command = [sys.executable, "-m", "enginery", "host", "--json"]
    started = time.monotonic()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(folder), **variables},
        capture_output=True,
        check=True,
        text=True,
    )
    return json.loads(done.stdout), time.monotonic() - started


def test_the_fingerprint_is_what_cuda_says_and_is_asked_once(device, tmp_path):
    first, cold = asked(tmp_path)
    (gpu,) = [gpu for gpu in first["gpus"] if gpu["uuid"] == device["uuid"]]
    assert None not in [gpu[name] for name in DEVICE_FACTS]
    same = set(DEVICE_FACTS) & set(device)
    assert {name: gpu[name] for name in same} == {name: device[name] for name in same}
    assert gpu["compute_capability"] == device["compute_capability"]
    assert first["driver"].partition(".")[0] == first["driver_branch"]
    assert (tmp_path / "enginery" / "devices.json").exists()
    again, warm = asked(tmp_path)
    assert again == first
    sys.stdout.write(f"enginery host: {cold:.2f} s when CUDA is asked, {warm:.2f} s after\n{json.dumps(gpu)}\n")


def test_what_is_hidden_is_not_there(device, tmp_path):
    assert asked(tmp_path, CUDA_VISIBLE_DEVICES="")[0]["gpus"] == []
    (gpu,) = asked(tmp_path, CUDA_VISIBLE_DEVICES=device["uuid"])[0]["gpus"]
    assert gpu["uuid"] == device["uuid"]
    (gpu,) = asked(tmp_path, CUDA_VISIBLE_DEVICES="0")[0]["gpus"]
    assert gpu["compute_capability"].startswith("sm")
