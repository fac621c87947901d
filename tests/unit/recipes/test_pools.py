"""Which pool a target belongs to, and which pools a host can work for."""

from __future__ import annotations

import pytest

from artifacts.host import Gpu, Host
from recipes.pools import PORTABLE, choose_pool, has_pool, host_queue, is_pool_name, pool_name, pools_of, portable_host

H100 = Gpu("NVIDIA H100", "GPU-1", "sm90", 80 << 30)
HOST = Host("a", "linux", "x86_64", "580.1", "13.0", (H100, H100), {"tensorrt": "10.16.1.11", "onnxruntime": "1.31.1"})


def test_a_pool_is_named_after_gpu_runtime_and_minor_version():
    assert pool_name("tensorrt", "10.16.1.11", "sm90") == "gpu-sm90-trt10.16"
    assert pool_name("tensorrt-rtx", "1.7.1.116", "sm89") == "gpu-sm89-rtx1.7"
    assert pool_name("tensorrt", "8.6.1.post1", "sm75") == "gpu-sm75-trt8.6"
    assert pool_name("onnxruntime", "1.31.1", "cpu") == PORTABLE
    with pytest.raises(ValueError, match="not a full version"):
        pool_name("tensorrt", "", "sm90")


def test_a_host_works_for_its_gpus_and_for_whatever_its_compiler_knows():
    assert pools_of(HOST) == ("portable", "gpu-sm90-trt10.16")
    rtx = pools_of(Host("b", "linux", "x86_64", runtimes={"tensorrt-rtx": "1.7.1.116"}))
    assert "gpu-sm89-rtx1.7" in rtx
    assert "gpu-sm120-rtx1.7" in rtx
    assert pools_of(Host("c", "linux", "x86_64", runtimes={"tensorrt": "10.16.1.11"})) == ("portable",)


def test_names_of_pools_and_of_hosts_queues():
    assert [is_pool_name(name) for name in ("portable", *pools_of(HOST), "gpu-sm90", "gpu-sm90-trt10", "default")] == [
        *(True,) * 3,
        *(False,) * 3,
    ]
    assert (has_pool("tensorrt"), has_pool("tensorrt-rtx"), has_pool("onnxruntime")) == (True, True, False)
    assert host_queue("gpu 1/a.example") == "host-gpu-1-a.example"  # Prefect takes no slash


def test_without_a_version_the_newest_pool_with_a_worker_is_chosen():
    there = ["gpu-sm90-trt10.9", "gpu-sm90-trt10.16", "gpu-sm90-trt11.4", "gpu-sm89-trt12.0"]
    assert choose_pool("tensorrt", "", "sm90", there, there[:2]) == "gpu-sm90-trt10.16"
    assert choose_pool("tensorrt", "", "sm90", there, []) == "gpu-sm90-trt11.4"
    assert choose_pool("tensorrt", "", "sm75", there, there) is None
    assert choose_pool("onnxruntime", "", "cpu", there, there) == PORTABLE


def test_a_pinned_version_takes_its_pool_or_none():
    there = ["gpu-sm90-trt10.9", "gpu-sm90-trt10.16"]
    assert choose_pool("tensorrt", "10.9.0.34", "sm90", there, there[1:]) == "gpu-sm90-trt10.9"
    assert choose_pool("tensorrt", "10.13.3.9", "sm90", there, there) is None


def test_the_portable_pool_compiles_nothing_that_has_a_pool():
    assert portable_host(HOST).runtimes == {"onnxruntime": "1.31.1"}
    assert not portable_host(HOST).gpus
