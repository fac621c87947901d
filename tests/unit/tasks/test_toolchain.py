import json
import subprocess
import sys

import pytest

from recipes.engine_stages import RUNTIME_PACKAGES
from tasks.toolchain import BACKENDS, probe_host, version

REPORT = """
import json, sys
from tasks.toolchain import probe_host, version
found = [version(name) for name in ("sklearn", "PIL", "onnxruntime", "torch", "no_such_package")]
probe_host()
print(json.dumps({"found": found, "modules": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def test_versions_and_host_are_found_without_importing_what_they_describe():
    done = subprocess.run([sys.executable, "-c", REPORT], capture_output=True, check=True, text=True)
    report = json.loads(done.stdout)
    assert report["found"][-1] is None
    assert None not in report["found"][:3]
    heavy = {"sklearn", "PIL", "onnxruntime", "torch", "numpy", "tensorrt_rtx", "prefect", "pydantic", "onnx"}
    assert not heavy & set(report["modules"])


def test_an_import_name_that_is_no_distribution_has_the_version_of_the_one_that_provides_it():
    sklearn = pytest.importorskip("sklearn")
    assert version("sklearn") == sklearn.__version__ == version("scikit-learn")


def test_what_is_not_installed_is_found_missing_without_reading_every_distribution():
    # On a host without a runtime, each plan would pay for that reading: half a second, measured.
    code = (
        "import sys\n"
        "from tasks.toolchain import _distributions, version\n"
        "print(version('no_such_package'), version('no-such.package'), _distributions.cache_info().currsize)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.split() == ["None", "None", "0"]


def test_a_distribution_in_ruins_counts_as_not_installed(tmp_path, monkeypatch):
    # What an interrupted uninstall leaves: a dist-info folder with nothing in it.
    (tmp_path / "ruined_enginery_probe-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert version("ruined_enginery_probe") is None


def test_the_host_names_every_runtime_that_compiles_here_with_its_full_version():
    onnxruntime = pytest.importorskip("onnxruntime")
    host = probe_host()
    assert host.runtimes["onnxruntime"] == onnxruntime.__version__
    assert (host.os, host.arch) == (sys.platform, host.arch.lower())
    assert set(host.runtimes) <= set(BACKENDS)


def test_keys_and_host_ask_the_same_package_for_a_runtimes_version():
    assert {runtime: RUNTIME_PACKAGES[runtime] for runtime in BACKENDS} == BACKENDS


def test_the_fingerprint_is_json():
    host = probe_host()
    assert json.loads(json.dumps(host.to_json()))["runtimes"] == dict(host.runtimes)


@pytest.mark.gpu
def test_gpus_are_seen_with_their_compute_capability():
    nvml = pytest.importorskip("pynvml", reason="needs nvidia-ml-py and a driver")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as err:
        pytest.skip(f"no NVIDIA driver: {err}")
    host = probe_host()
    assert len(host.gpus) == nvml.nvmlDeviceGetCount()
    assert all(gpu.compute_capability.startswith("sm") and host.has_gpu(gpu.compute_capability) for gpu in host.gpus)
    assert host.driver
    assert host.cuda
