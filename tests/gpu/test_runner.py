"""The public runner on a GPU: engines compiled here, pulled, loaded, and called in every way that serving code may."""

import subprocess
import sys
import threading

import numpy as np
import pytest

import enginery
from artifacts.cache import blob_path
from artifacts.catalog import EngineCatalog
from artifacts.folder import FolderStore
from artifacts.refs import ENGINE_PLAN, ArtifactRef, digest_file
from enginery import client
from tasks.engines.cuda import Cuda
from tasks.errors import CallError
from tasks.toolchain import probe_host
from tests.engines import digest, make_manifest
from tests.gpu.compiling import PROFILES, Compiler
from tests.unit.tasks.small_graphs import cnn, evaluate, images

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def pulled(device, tmp_path_factory):
    """The small convolutional network in fp32 with two profiles, published and pulled."""
    folder = tmp_path_factory.mktemp("runner")
    result, output = Compiler(device["compute_capability"], folder / "built")(cnn())
    store, plan = FolderStore(folder / "store"), output / "model.plan"
    ref = ArtifactRef(digest_file(plan), plan.stat().st_size, ENGINE_PLAN)
    store.put_file(blob_path(ref.digest), plan, ref)
    host = probe_host()
    manifest = make_manifest(
        {
            "identity.target": f"tensorrt-{result.facts['runtime_version']}-{device['compute_capability']}",
            "compatibility.runtime": "tensorrt",
            "compatibility.runtime_version": host.runtimes["tensorrt"],
            "compatibility.gpus": [device["compute_capability"]],
            "compatibility.os": host.os,
            "compatibility.arch": host.arch,
            "files": {"model.plan": ref.to_json()},
            "inputs": {"x": {"dtype": "float32", "shape": ["batch", 1, "height", "width"]}},
            "outputs": {"y": {"dtype": "float32", "shape": ["batch", 10]}},
            "profiles": PROFILES,
            "provenance.key": digest("runner"),
        }
    )
    EngineCatalog(store).publish(manifest)
    return client.pull(store, manifest, folder / "pulled")


@pytest.fixture
def engine(pulled):
    with enginery.load(pulled) as loaded:
        yield loaded


def expected(x):
    return evaluate(cnn(), {"x": x})["y"]


def check(found, x):
    assert np.linalg.norm(found - expected(x)) / np.linalg.norm(expected(x)) < 1e-5


def test_shapes_of_both_profiles_in_any_order_again_and_again(engine):
    assert engine.device == "cuda:0"
    assert [profile.name for profile in engine.profiles] == ["online", "bulk"]
    for repeat in range(8):
        for shape in [(1, 8, 8), (4, 16, 16), (64, 8, 8), (128, 8, 8), (3, 11, 13)]:
            x = images(*shape, seed=repeat)
            check(engine(x=x)["y"], x)


def test_the_chosen_profile_is_used_and_both_agree(engine):
    x = images(2)
    for profile in ("online", "bulk", "online"):
        check(engine(x=x, profile=profile)["y"], x)


def test_graphs_give_what_runs_without_them_give(pulled):
    with enginery.load(pulled) as replayed, enginery.load(pulled, graphs=False) as plain:
        # One shape after another, so that every version replays; then in turns.
        for seed, count in enumerate((*[1] * 8, *[2] * 8, *[1, 2] * 8)):
            x = images(count, seed=seed)
            np.testing.assert_array_equal(replayed(x=x)["y"], plain(x=x)["y"])
        assert [words for words in replayed.warnings if "no CUDA graph" in words] == []


def test_what_is_captured_is_really_replayed(pulled):
    """Where the plan's own pool says that a shape has a graph, TensorRT is not asked again."""
    with enginery.load(pulled) as engine:
        engine.prepare({"x": [2, 1, 8, 8]})
        pool = engine._execution._pool
        slot, graph = pool.slot(0, ((2, 1, 8, 8),))
        assert graph
        assert slot._graph is not None


def test_a_profile_keeps_its_graph_while_another_runs(pulled):
    """Contexts of all profiles work in one scratch memory, and replay in turns."""
    with enginery.load(pulled) as engine:
        for seed in range(10):
            for count in (2, 128):
                x = images(count, seed=seed)
                check(engine(x=x)["y"], x)
        pool = engine._execution._pool
        assert all(pool.slot(index, ((count, 1, 8, 8),))[0]._graph is not None for index, count in ((0, 2), (1, 128)))


def test_the_last_profile_may_come_first(pulled):
    for graphs in (True, False):
        with enginery.load(pulled, graphs=graphs) as engine:
            for seed in range(4):
                for count in (128, 2, 64):
                    x = images(count, seed=seed)
                    check(engine(x=x)["y"], x)


def test_more_shapes_than_there_are_contexts_for(engine):
    """Where TensorRT lets contexts share a profile, shapes that come back get their own, up to eight; 8.6 has one context."""
    for seed in range(5):
        for count in range(5, 25):
            x = images(count, seed=seed)
            check(engine(x=x)["y"], x)


def test_the_largest_batches_are_right_and_land_where_they_should(engine):
    x = images(128)
    for _ in range(6):
        check(engine(x=x)["y"], x)
    x = images(4, 16, 16)
    out = np.empty((4, 10), np.float32)
    assert engine(x=x, out={"y": out})["y"] is out
    check(out, x)


class OnDevice:
    """A minimal array on the GPU, with the CUDA array interface and nothing else."""

    def __init__(self, cuda, values, offset=0):
        self.address = cuda.allocate(values.nbytes + offset) + offset
        cuda.upload(self.address, values)
        cuda.synchronize()
        self._cuda, self._like = cuda, values

    @property
    def __cuda_array_interface__(self):
        return {
            "shape": self._like.shape, "typestr": self._like.dtype.str, "data": (self.address, False), "version": 3,
            "strides": None, "stream": None,
        }  # fmt: skip

    def read(self):
        found = np.empty_like(self._like)
        self._cuda.download(found, self.address)
        self._cuda.synchronize()
        return found


@pytest.mark.parametrize("offset", [0, 4], ids=["aligned", "not aligned"])
def test_arrays_on_the_device_are_used_where_they_lie(engine, offset):
    cuda = Cuda()
    try:
        for seed in range(8):
            x = images(2, seed=seed)
            given, y = OnDevice(cuda, x, offset), OnDevice(cuda, np.zeros((2, 10), np.float32), offset)
            check(engine(x=given)["y"], x)
            assert engine(x=given, out={"y": y})["y"] is y
            check(y.read(), x)
            assert engine(x=x, out={"y": y})["y"] is y
            check(y.read(), x)
        for _ in range(6):  # the same addresses again: replayed
            engine(x=given, out={"y": y})
            check(y.read(), x)
        with pytest.raises(CallError, match="x is float16 on the device, the engine has float32"):
            engine(x=OnDevice(cuda, x.astype(np.float16)))
    finally:
        cuda.make_current()
        cuda.close()


def test_tensors_of_pytorch_are_used_where_they_lie(engine):
    torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'enginery[torch]')")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch here has no CUDA")
    x = images(2)
    given = torch.from_numpy(x).cuda()
    y = torch.empty(2, 10, device="cuda")
    engine(x=given * 1, out={"y": y})  # the product may still be running in PyTorch's stream
    check(y.cpu().numpy(), x)


def test_other_threads_may_call(engine):
    x, found = images(2), []
    threads = [threading.Thread(target=lambda: found.append(engine(x=x)["y"])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for y in found:
        check(y, x)


def test_what_the_caller_got_wrong_is_said_and_the_engine_goes_on(engine):
    for given, words in (
        ({"x": images(129)}, r"no profile of the plan admits x \[129, 1, 8, 8\] \(profile online: x"),
        ({"x": images(1).astype(np.float64)}, "input x is float64, the engine takes float32"),
        ({"z": images(1)}, "no input x; unknown z"),
    ):
        with pytest.raises(CallError, match=words):
            engine(given)
    with pytest.raises(CallError, match=r"the output y is \[1, 10\] at these inputs"):
        engine(x=images(1), out={"y": np.empty((2, 10), np.float32)})
    check(engine(x=images(1))["y"], images(1))


def test_closed_engines_free_the_memory(pulled):
    cuda = Cuda()
    try:
        with enginery.load(pulled) as engine:  # kernels stay loaded as long as the context of the device
            engine(x=images(128))
        cuda.make_current()
        before = cuda.free_bytes()
        for _ in range(3):
            with enginery.load(pulled) as engine:
                engine(x=images(128))
        cuda.make_current()
        assert before - cuda.free_bytes() < 64 << 20
    finally:
        cuda.close()


def test_a_process_that_never_closes_its_engine_ends_well(pulled):
    code = """
import sys, numpy, enginery
engine = enginery.load(sys.argv[1])
for count in (2, 2, 2, 2, 128, 128, 128, 128):
    engine(x=numpy.zeros((count, 1, 8, 8), numpy.float32))
"""
    ended = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code, pulled.folder],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
