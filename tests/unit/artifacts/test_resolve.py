import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.host import Gpu, Host
from artifacts.resolve import Request, resolve
from tests.engines import digest, make_manifest, manifest_document

MEASURED = manifest_document()["verification"]["graph"]
RTX = "1.7.1.116"


def engine(
    build="fp16-0",
    *,
    runtime="tensorrt-rtx",
    version=RTX,
    gpu="sm89",
    given="fp16",
    asked=None,
    created="2026-01-01T00:00:00Z",
    wish=("int8", "fp16", "fp32"),
    source="one",
    executed=False,
    **changes,
):
    changed = {
        "identity.target": f"{runtime}-{version}-{gpu}",
        "identity.build": build,
        "identity.created": created,
        "compatibility.runtime": runtime,
        "compatibility.runtime_version": version,
        "compatibility.gpus": [gpu],
        "precision.given": given,
        "precision.asked": asked or given,
        "precision.wish": list(wish),
        "provenance.source": {"weights": digest(source)},
    }
    if executed:
        changed["verification.engine"] = MEASURED
    return make_manifest(changed | {name.replace("__", "."): value for name, value in changes.items()})


def request(**changes):
    return Request(**{"runtimes": {"tensorrt-rtx": RTX}, "gpus": ("sm89",), "os": "linux", "arch": "x86_64"} | changes)


def best(engines, asked=None, channels=None):
    one, two = (resolve(order, asked or request(), channels).best for order in (engines, engines[::-1]))
    assert one == two
    return None if one is None else one.identity.build


@pytest.mark.parametrize(
    ("manifest", "asked", "reason"),
    [
        (engine(), request(runtimes={"onnxruntime": "1.31.1"}), "needs tensorrt-rtx; there is onnxruntime"),
        (engine(), request(runtimes={}), "needs tensorrt-rtx; there is no runtime"),
        (engine(), request(runtimes={"tensorrt-rtx": "1.7.1.117"}), f"needs tensorrt-rtx {RTX}; there is 1.7.1.117"),
        (engine(), request(gpus=("sm90", "cpu")), "is for sm89; there is sm90, cpu"),
        (engine(), request(os="windows"), "is for linux x86_64; there is windows x86_64"),
        (engine(), request(arch="aarch64"), "is for linux x86_64; there is linux aarch64"),
        (engine(), request(precision="int8"), "is fp16, not int8"),
        (engine(), request(channel="production"), "channel production names nothing for this target"),
        (engine(), request(shapes={"image": (5, 1, 16, 16)}), "no profile covers image=5x1x16x16"),
        (engine(), request(shapes={"image": (1, 3, 8, 8)}), "no profile covers image=1x3x8x8"),
        (engine(), request(shapes={"image": (1, 8, 8)}), "no profile covers image=1x8x8"),
        (engine(), request(shapes={"pixels": (1,)}), "has no input pixels"),
        (engine(verification__passed=False), request(), "its gates did not pass"),
        (engine(compatibility__driver_minimum="580.65.06"), request(driver="570.1"), "needs driver 580.65.06"),
        (engine(compatibility__driver_minimum="580.65.06"), request(), "there is none known"),
    ],
)
def test_a_rule_that_is_broken_refuses_and_says_why(manifest, asked, reason):
    resolution = resolve([manifest], asked)
    assert resolution.best is None
    (candidate,) = resolution.candidates
    assert any(reason in said for said in candidate.reasons), candidate.reasons
    assert len(candidate.reasons) == 1


@pytest.mark.parametrize(
    ("manifest", "asked"),
    [
        (engine(), request()),
        (engine(), request(driver="470.1")),
        (engine(compatibility__driver_minimum="580.65.06"), request(driver="580.126.09")),
        (engine(), request(shapes={"image": (4, 1, 16, 9)})),
        (engine(), request(shapes={"image": (256, 1, 8, 8)})),
        (engine(), request(shapes={})),
        (engine(compatibility__gpus=["sm86", "sm89"]), request()),
        (engine(), request(precision="fp16")),
    ],
)
def test_what_breaks_no_rule_fits(manifest, asked):
    assert resolve([manifest], asked).best == manifest


def test_every_broken_rule_is_told_and_no_engine_is_left_out():
    engines = [engine("a"), engine("b", gpu="sm80", version="1.6", given="int8")]
    resolution = resolve(engines, request(os="windows"))
    assert [len(candidate.reasons) for candidate in resolution.candidates] == [3, 1]
    assert {candidate.manifest.identity.build for candidate in resolution.candidates} == {"a", "b"}


def test_no_engine_resolves_to_none():
    assert resolve([], request()).best is None


def test_a_channel_decides_whatever_is_newer():
    engines = [engine("old"), engine("new", created="2026-02-01T00:00:00Z")]
    target = engines[0].identity.target
    assert best(engines, request(channel="production"), {target: "old"}) == "old"
    assert best(engines, request(channel="production"), {target: "gone"}) is None


def test_a_gpu_comes_before_the_cpu_even_where_only_the_cpu_engine_was_executed():
    both = request(runtimes={"tensorrt-rtx": RTX, "onnxruntime": "1.31.1"}, gpus=("sm89", "cpu"))
    cpu = engine("cpu", runtime="onnxruntime", version="1.31.1", gpu="cpu", executed=True)
    assert best([cpu, engine("gpu")], both) == "gpu"
    assert best([cpu, engine("gpu", gpu="sm80")], both) == "cpu"


def test_executed_comes_before_wanted_and_new():
    executed = engine("a", given="fp32", executed=True)
    assert best([executed, engine("b", given="int8", created="2026-02-01T00:00:00Z")]) == "a"


def test_what_is_wanted_most_comes_first_though_it_had_to_give_way():
    wanted = engine("a", asked="int8", given="fp32")
    assert best([wanted, engine("b", given="fp16", created="2026-02-01T00:00:00Z")]) == "a"


def test_the_newest_engine_says_what_is_wanted_most():
    old = engine("a", given="int8")
    new = engine("b", given="fp16", created="2026-02-01T00:00:00Z", wish=("fp16", "int8"))
    assert best([old, new]) == "b"


def test_old_weights_never_win_over_new_ones_by_precision_or_by_having_been_executed():
    old = engine("a", given="int8", executed=True, source="old weights")
    new = engine("b", given="fp16", created="2026-02-01T00:00:00Z", source="new weights")
    assert best([old, new]) == "b"
    assert best([old, engine("c", gpu="sm80", created="2026-02-01T00:00:00Z", source="new weights")]) == "a"


def test_the_newest_of_equals_wins():
    engines = [
        engine(name, created=created)
        for name, created in (
            ("a", "2026-01-01T00:00:00Z"),
            ("b", "2026-01-01T00:00:01.5Z"),
            ("c", "2026-01-01T00:00:01Z"),
        )
    ]
    for order in itertools.permutations(engines):
        assert best(list(order)) == "b"


def test_a_host_may_load_for_all_of_its_gpus_and_its_cpu():
    gpus = tuple(Gpu("L4", f"GPU-{index}", name, 1) for index, name in enumerate(("sm89", "sm89", "sm120")))
    host = Host("box", "linux", "x86_64", "580.1", "13.0", gpus, {"tensorrt-rtx": RTX})
    asked = Request.of_host(host, shapes={"image": (1, 1, 8, 8)})
    assert asked.gpus == ("sm89", "sm120", "cpu")
    assert best([engine("a", gpu="sm120")], asked) == "a"
    assert best([engine("a", gpu="sm80")], asked) is None


H200 = Gpu("NVIDIA H200", "GPU-1", "sm90", 140 << 30, sm_count=132, bus_width_bits=6144, ecc=True)
H100 = replace(H200, name="NVIDIA H100 PCIe", memory_bytes=80 << 30, sm_count=114, bus_width_bits=5120)


def offered(built_on, *gpus):
    """Say why an engine that is bound to a device is refused to a host with these GPUs; None where it is not."""
    made = engine(gpu="sm90", runtime="tensorrt", version="8.6.0", compatibility__device=built_on)
    host = Host("box", "linux", "x86_64", "580.1", "13.0", gpus, {"tensorrt": "8.6.0"})
    (candidate,) = resolve([made], Request.of_host(host)).candidates
    return "; ".join(candidate.reasons) or None


def test_an_engine_that_is_bound_to_a_device_is_offered_to_its_like():
    assert offered(H200.device(), replace(H200, uuid="GPU-2")) is None
    assert offered(H200.device(), H100, H200) is None
    assert offered(None, H100) is None  # hardware compatible, or of an older release
    refused = offered(H200.device(), H100, replace(H200, compute_capability="sm89"))
    assert refused == (
        "was built on a GPU with name NVIDIA H200 and not NVIDIA H100 PCIe, memory_bytes 150323855360 and not 85899345920, "
        "sm_count 132 and not 114, bus_width_bits 6144 and not 5120 (NVIDIA H100 PCIe here)"
    )
    assert "ecc True and not False" in offered(H200.device(), replace(H200, ecc=False))


def test_what_a_host_does_not_tell_of_its_gpu_is_not_held_against_it():
    assert offered(H200.device(), replace(H200, sm_count=None, ecc=None)) is None
    assert offered({"name": "NVIDIA H200", "from_a_later_release": 1}, H200) is None
    assert offered({"name": "NVIDIA H200"}, H100) is not None


def test_who_asks_by_compute_capability_alone_is_not_asked_for_a_device():
    made = engine(gpu="sm90", compatibility__device=H200.device())
    assert resolve([made], request(gpus=("sm90",))).best == made


RULE = {
    "seconds": 1.0, "window_seconds": 1.0, "window_runs": 1, "windows": 1, "tolerance": 0.1,
    "most_samples": 1, "least_samples": 1,
}  # fmt: skip


def timed(device, **cases):
    """Return a benchmark on a device: CASE="profile:p50", with a CUDA graph where the case's name ends in _graph."""
    made = []
    for name, said in cases.items():
        profile, _colon, p50 = said.partition(":")
        of = {"p50": float(p50), "p90": 9.0, "p99": 9.0, "mean": 9.0, "runs": 9}
        made.append(
            {
                "name": name.removesuffix("_graph"), "profile": profile, "batch": 1, "graph": name.endswith("_graph"),
                "steady": True, "warm_up_runs": 1, "latency_ms": of, "end_to_end_ms": of, "device_ms": None,
                "throughput": 1.0, "copy_share": None, "gpu_memory_bytes": None,
            }
        )  # fmt: skip
    return {"device": device, "key": digest("benchmark"), "rule": RULE, "cases": made}


L4, L40S = (Gpu(name, f"GPU-{name}", "sm89", 1) for name in ("NVIDIA L4", "NVIDIA L40S"))
PROFILE, OTHER = (profile["name"] for profile in manifest_document()["profiles"])


def fast(build, p50, device="NVIDIA L4", **more):
    return engine(build, benchmark=timed(device, one=f"{PROFILE}:{p50}"), **more)


def test_the_fastest_measured_on_this_device_comes_before_what_is_wanted_executed_or_new():
    slow = fast("slow", 2.0, given="int8", executed=True, created="2026-02-01T00:00:00Z")
    for quick in (fast("quick", 1.0), fast("quick", 1.0, given="fp32")):
        assert best([slow, quick], request(devices=(L4,))) == "quick"
        assert best([slow, quick], request(devices=(L40S,))) == "slow"  # it was measured on another device
        assert best([slow, quick]) == "slow"  # no device is named
    assert best([engine("new", executed=True, created="2027-01-01T00:00:00Z"), slow], request(devices=(L4,))) == "slow"


def test_what_is_nearly_as_fast_as_the_fastest_is_as_fast():
    engines = [fast("a", 1.0), fast("b", 1.049, created="2026-02-01T00:00:00Z"), fast("c", 1.06, given="int8")]
    assert best(engines, request(devices=(L4,))) == "b"


def test_old_weights_and_the_cpu_never_win_by_being_fast():
    new = fast("new", 9.0, created="2026-02-01T00:00:00Z", source="new weights")
    assert best([fast("old", 1.0), new], request(devices=(L4,))) == "new"


def test_times_of_two_devices_are_not_compared():
    here = request(devices=(L4, L40S))
    engines = [fast("a", 1.0, device="NVIDIA L40S"), fast("b", 2.0, created="2026-02-01T00:00:00Z"), fast("c", 1.5)]
    assert best(engines, here) == "c"


def test_a_case_counts_in_its_better_way_and_where_its_profile_covers_what_is_asked_for():
    graph = engine("graph", benchmark=timed("NVIDIA L4", one=f"{PROFILE}:4", one_graph=f"{PROFILE}:1"))
    assert best([graph, fast("plain", 2.0)], request(devices=(L4,))) == "graph"
    shapes = {
        profile["name"]: {name: tuple(span["max"]) for name, span in profile["inputs"].items()}
        for profile in manifest_document()["profiles"]
    }
    small = engine("small", benchmark=timed("NVIDIA L4", one=f"{PROFILE}:1", two=f"{OTHER}:9"))
    large = engine("large", benchmark=timed("NVIDIA L4", one=f"{PROFILE}:3", two=f"{OTHER}:1"))
    assert best([small, large], request(devices=(L4,), shapes=shapes[OTHER])) == "large"
    assert best([small, large], request(devices=(L4,))) == "large"  # the mean over both
    # Timed at fewer cases than the newest was: nobody knows how fast it is at the others.
    assert best([small, fast("part", 0.1)], request(devices=(L4,))) == "small"


engines_strategy = st.lists(
    st.builds(
        engine,
        build=st.sampled_from(["a", "b", "c", "d"]),
        runtime=st.sampled_from(["tensorrt-rtx", "onnxruntime"]),
        version=st.sampled_from([RTX, "1.31.1"]),
        gpu=st.sampled_from(["sm80", "sm89", "cpu"]),
        given=st.sampled_from(["fp16", "int8"]),
        asked=st.sampled_from(["fp16", "int8"]),
        created=st.sampled_from(["2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"]),
        source=st.sampled_from(["one", "two"]),
        executed=st.booleans(),
        verification__passed=st.booleans(),
        benchmark=st.one_of(
            st.none(),
            st.builds(
                lambda device, p50: timed(device, one=f"{PROFILE}:{p50}"),
                st.sampled_from([L4.name, L40S.name]),
                st.sampled_from([1.0, 1.04, 1.08, 1.2, 3.0]),
            ),
        ),
    ),
    max_size=5,
    unique_by=lambda manifest: str(manifest.identity),
)
requests_strategy = st.builds(
    request,
    runtimes=st.dictionaries(st.sampled_from(["tensorrt-rtx", "onnxruntime"]), st.sampled_from([RTX, "1.31.1"])),
    gpus=st.lists(st.sampled_from(["sm80", "sm89", "cpu"]), unique=True),
    os=st.sampled_from(["linux", "windows"]),
    precision=st.sampled_from([None, "fp16"]),
    shapes=st.sampled_from([{}, {"image": (1, 1, 8, 8)}, {"image": (64, 1, 16, 16)}]),
    devices=st.lists(st.sampled_from([L4, L40S]), unique=True),
)


def obeys(manifest, asked):
    """Say the rules once more, as plainly as possible."""
    needs = manifest.compatibility
    return (
        asked.runtimes.get(needs.runtime) == needs.runtime_version
        and any(gpu in asked.gpus for gpu in needs.gpus)
        and (asked.os, asked.arch) == (needs.os, needs.arch)
        and manifest.verification.passed
        and asked.precision in (None, manifest.precision.given)
        and asked.shapes.get("image") != (64, 1, 16, 16)
    )


@given(engines_strategy, requests_strategy, st.randoms())
def test_the_answer_is_a_candidate_that_obeys_every_rule_whatever_the_order(engines, asked, random):
    resolution = resolve(engines, asked)
    assert {str(c.manifest.identity) for c in resolution.candidates} == {str(m.identity) for m in engines}
    assert [c.fits for c in resolution.candidates] == sorted((obeys(m, asked) for m in engines), reverse=True)
    assert all(obeys(candidate.manifest, asked) == candidate.fits for candidate in resolution.candidates)
    assert resolution.best == next((c.manifest for c in resolution.candidates if c.fits), None)
    shuffled = list(engines)
    random.shuffle(shuffled)
    assert resolve(shuffled, asked) == resolution


@given(engines_strategy, requests_strategy)
def test_nothing_that_fits_is_much_faster_on_this_device_than_the_answer(engines, asked):
    """Of engines for GPUs, of the answer's source, timed at one case on the only device that is here."""
    answer = resolve(engines, asked).best
    if answer is None or "cpu" in answer.compatibility.gpus or len(asked.devices) != 1:
        return
    here = asked.devices[0].name
    times = {
        str(one.identity): one.benchmark.cases[0].latency_ms.p50
        for one in engines
        if obeys(one, asked) and "cpu" not in one.compatibility.gpus
        and one.provenance.source == answer.provenance.source
        and one.benchmark is not None and one.benchmark.device == here
    }  # fmt: skip
    if times:
        assert times[str(answer.identity)] <= 1.05 * min(times.values())


def spare(build="fp32-9", **changes):
    facts = {"kind": "onnx", "instead_of": ["tensorrt-rtx:sm89"], "providers": {}}
    return engine(
        build, runtime="onnxruntime", version="1.31.1", gpu="cpu", given="fp32", schema=3, fallback=facts, **changes
    )


ORT = {"tensorrt-rtx": RTX, "onnxruntime": "1.31.1"}


def test_a_fallback_is_offered_only_where_no_engine_fits():
    asked = request(runtimes=ORT, gpus=("sm89", "cpu"))
    assert best([spare(), engine(created="2020-01-01T00:00:00Z")], asked) == "fp16-0"
    assert best([spare(), engine(gpu="sm120")], asked) == "fp32-9"
    passed_over = resolve([spare(), engine()], asked).candidates[-1]
    assert passed_over.reasons == ("is a fallback, and an engine fits",)


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({"os": "windows", "arch": "aarch64"}, True),
        ({"runtimes": {"onnxruntime": "1.40.0"}}, True),
        ({"runtimes": {"onnxruntime": "1.30.9"}}, False),
        ({"runtimes": {"tensorrt-rtx": RTX}}, False),
        ({"precision": "fp16"}, False),
    ],
)
def test_a_fallback_takes_any_system_and_a_later_runtime(changes, fits):
    asked = request(**{"runtimes": ORT, "gpus": ("cpu",)} | changes)
    assert (best([spare()], asked) is not None) is fits


@pytest.mark.parametrize(
    ("form", "version", "fits"),
    [
        ("exported program", "2.13.0+cu126", True),
        ("exported program", "2.13.1", True),
        ("exported program", "2.14.0", False),
        ("exported program", "2.12.9", False),
        ("TorchScript (traced)", "2.14.0", True),
        ("TorchScript (traced)", "2.12.9", False),
    ],
)
def test_a_source_model_is_for_hosts_with_its_framework_of_a_version_that_reads_it(form, version, fits):
    saved = {"": {"form": form, "inputs": ["image"], "outputs": ["logits"]}}
    facts = {"kind": "source", "instead_of": ["tensorrt-rtx:sm89"], "saved": saved}
    model = engine(runtime="torch", version="2.13.0+cpu", gpu="cpu", schema=3, fallback=facts)
    host = Host("here", "linux", "x86_64", runtimes=ORT, frameworks={"torch": version})
    answer = resolve([model], Request.of_host(host))
    assert (answer.best is not None) is fits
    if not fits:
        assert answer.candidates[0].reasons == (f"needs torch 2.13.0+cpu; there is {version}",)
    # An engine of a framework's name is none: only fallbacks are served by frameworks.
    assert resolve([engine(runtime="torch", version=version, gpu="cpu")], Request.of_host(host)).best is None
