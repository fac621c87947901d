"""What a host's GPUs are, asked through pynvml and CUDA's driver interface of stand-ins for the driver's libraries."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from artifacts.host import Gpu
from tasks import cuda_probe
from tasks.devices import _groups

WHOLE = "GPU-00000000-0000-0000-0000-000000000001"
SLICES = ("MIG-00000000-0000-0000-0000-00000000000a", "MIG-00000000-0000-0000-0000-00000000000b")
PROBE = """
import json
from dataclasses import asdict
from tasks.devices import probe_gpus
driver, cuda, gpus = probe_gpus()
print(json.dumps([driver, cuda, [asdict(gpu) for gpu in gpus]]))
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A folder with stand-ins for the driver's libraries."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is needed to stand in for the driver's libraries")
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("driver_stand_ins.c")
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        subprocess.run(["gcc", "-w", "-shared", "-fPIC", "-o", folder / name, source], check=True)
    return folder


@pytest.fixture
def probe(driver, tmp_path):
    """Probe in a process of its own, in which the driver's libraries are found; `probe.starts()` counts CUDA's starts."""

    def run(**variables):
        own = {"LD_LIBRARY_PATH": str(driver), "XDG_CACHE_HOME": str(tmp_path), "STARTS": str(tmp_path / "starts")}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
        done = subprocess.run(
            [sys.executable, "-c", PROBE],
            env={**kept, **own, **variables},
            capture_output=True,
            check=True,
            text=True,
            timeout=60,
        )
        version, cuda, gpus = json.loads(done.stdout)
        return version, cuda, [Gpu(**gpu) for gpu in gpus]

    run.starts = lambda: (tmp_path / "starts").read_text().split() if (tmp_path / "starts").exists() else []
    return run


def test_gpus_and_slices_are_listed_with_what_cuda_tells_of_them(probe):
    version, cuda, (whole, *slices) = probe()
    assert (version, cuda) == ("580.159.04", "13.1")
    assert whole == Gpu(
        "NVIDIA H200",
        WHOLE,
        "sm90",
        140 << 30,
        sm_count=132,
        bus_width_bits=37_000,
        l2_bytes=38_000,
        shared_memory_per_block=8000,
        shared_memory_per_block_optin=97_000,
        shared_memory_per_sm=81_000,
        texture_alignment=14_000,
        integrated=True,
        ecc=True,  # NVML's word: what CUDA said may be from before the last change
    )
    assert [(part.uuid, part.name, part.sm_count, part.mig, part.ecc) for part in slices] == [
        (uuid, "NVIDIA H200 MIG 1g.18gb", 16, True, True) for uuid in SLICES
    ]
    assert slices[0].device() == slices[1].device() != whole.device()


def test_cuda_is_started_once_for_each_boot_and_kind_of_device(probe):
    first = probe()
    assert probe.starts() == [WHOLE, SLICES[0]]  # one for both slices: a process sees one
    assert probe() == first
    assert len(probe.starts()) == 2


def test_what_another_boot_or_driver_left_is_not_believed(probe, tmp_path):
    first = probe()
    known = tmp_path / "enginery" / "devices.json"
    document = json.loads(known.read_text())
    for spoilt in (json.dumps({**document, "era": "another boot"}), json.dumps({**document, "asked": []}), "{", "[]"):
        known.write_text(spoilt)
        before = len(probe.starts())
        assert probe() == first
        assert len(probe.starts()) == before + 2


def test_a_cache_folder_that_cannot_be_written_costs_time_only(probe, tmp_path):
    (tmp_path / "file").write_text("")
    assert probe(XDG_CACHE_HOME=str(tmp_path / "file")) == probe()


def test_only_what_cuda_shows_here_is_used(probe):
    assert [gpu.uuid for gpu in probe(CUDA_VISIBLE_DEVICES=SLICES[1])[2]] == [SLICES[1]]
    assert probe(CUDA_VISIBLE_DEVICES=WHOLE)[2] == [probe()[2][0]]
    assert probe(CUDA_VISIBLE_DEVICES="")[2] == []


def test_where_cuda_does_not_start_nvml_still_names_the_gpus(probe):
    version, cuda, gpus = probe(BROKEN="1")
    assert (version, cuda) == ("580.159.04", None)
    assert [(gpu.uuid, gpu.sm_count) for gpu in gpus] == [(uuid, None) for uuid in (WHOLE, *SLICES)]
    assert gpus[0].bus_width_bits == 6016
    assert len(probe()[2]) == 3
    assert probe()[2][0].sm_count == 132  # that it did not start was not remembered


def test_without_nvml_cuda_lists_what_it_sees(probe, driver, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(driver / "libcuda.so.1", alone)
    _version, cuda, gpus = probe(LD_LIBRARY_PATH=str(alone))
    assert cuda == "13.1"
    assert [(gpu.uuid, gpu.sm_count, gpu.ecc) for gpu in gpus] == [(WHOLE, 132, False)]


@pytest.mark.parametrize(("load", "expected"), [("", []), ("rates", [WHOLE]), ("processes", [SLICES[0]])])
def test_a_device_is_busy_where_others_have_processes_or_kernels_on_it(driver, load, expected):
    code = f"from tasks.devices import busy_gpus; print(sorted(busy_gpus({[WHOLE, *SLICES, 'GPU-unknown']})))"
    own = {"LD_LIBRARY_PATH": str(driver), "BUSY": load}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **own}, capture_output=True, check=True, text=True
    )
    assert done.stdout.strip() == str(expected)


def test_without_a_driver_the_probe_says_nothing():
    probe = subprocess.run(
        [sys.executable, "-I", "-S", cuda_probe.__file__],
        env={"LD_LIBRARY_PATH": ""},
        capture_output=True,
        check=True,
        text=True,
    )
    if probe.stdout != "null":
        pytest.skip("a CUDA driver is here")
    assert "libcuda" in probe.stderr


def test_the_numbers_of_attributes_are_cudas():
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    from tasks.engines.cuda import _ATTRIBUTES, _FLAGS

    spelled = {**_ATTRIBUTES, **_FLAGS, "major": "COMPUTE_CAPABILITY_MAJOR", "minor": "COMPUTE_CAPABILITY_MINOR"}
    numbers = {
        name: int(getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{words}")) for name, words in spelled.items()
    }
    assert numbers == cuda_probe.ATTRIBUTES


def test_whole_gpus_are_asked_about_together_and_slices_by_kind():
    whole = [Gpu("H200", f"GPU-{index}", "sm90", 1) for index in range(2)]
    slices = [
        Gpu(f"H200 MIG {name}", f"MIG-{name}-{index}", "sm90", 1, mig=True) for name in "ab" for index in range(2)
    ]
    assert [[gpu.uuid for gpu in group] for group in _groups([*whole, *slices])] == [
        ["GPU-0", "GPU-1"],
        ["MIG-a-0", "MIG-a-1"],
        ["MIG-b-0", "MIG-b-1"],
    ]
