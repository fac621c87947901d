"""Timing caches in a store: what is lent, what is taken back, and what becomes of builders that finish at once."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from artifacts.errors import StoreError
from artifacts.folder import FolderStore
from artifacts.host import Gpu, Host
from artifacts.keys import Action
from artifacts.store import open_store
from recipes.steps import Step
from tasks.engines.trt_log import Log
from tasks.engines.trt_timing import TimingCache, merge_with
from tasks.process import Limits, run_stage
from tasks.stage import StageResult
from tasks.timing import LentCache, lent_cache

H200 = Gpu("NVIDIA H200", "GPU-1", "sm90", 140 << 30, sm_count=132)
HOST = Host("here", "linux", "x86_64", "580.159.04", "13.0", (H200,), {"tensorrt": "8.6.0"})
TOOLS = {"tensorrt": "8.6.0", "os": "linux", "arch": "x86_64", "cuda": "cu12", "device": H200.device(), "driver": "580"}
WELL = {"used": True, "reloads": True}


def step(stage="compile", inputs=None, **tools):
    params = {"runtime": "tensorrt", "gpu": "sm90"}
    action = Action(stage, 1, params, dict.fromkeys(inputs or (), "0" * 64), {**TOOLS, **tools})
    return Step(f"{stage}:it", stage, "run", action=action, inputs=dict.fromkeys(inputs or (), None))


def loan(store, gpu=H200, host=HOST, **tools):
    return lent_cache(store, step(**tools), gpu, host)


def lines(data):
    return set(data.decode().split())


def union(there, made):
    """Merge caches of this test: words, each of which stands for a measurement."""
    return " ".join(sorted(lines(there) | lines(made))).encode(), "None"


def refuse(there, made):
    return None, "another device"


def never(there, made):
    raise AssertionError("there is nothing to merge")


def build(store, folder, word, *, combine=never, facts=WELL, **tools):
    """One build with a cache: what it was lent, and what came of it. It adds one word to what it was lent."""
    folder.mkdir(exist_ok=True)
    target = folder / "given"
    target.unlink(missing_ok=True)
    own = loan(store, **tools)
    lent = target.read_bytes() if own.lend(target) else b""
    made = folder / "made"
    made.write_bytes(union(lent if facts["used"] else b"", word.encode())[0])
    own.take_back(made, facts, combine)
    return lines(lent), own.facts


def kept(store):
    (cache,) = [info.path for info in store.list("timing/") if info.path.endswith(".cache")]
    return lines(store.read(cache).partition(b"\n")[2])


@pytest.fixture
def store(tmp_path):
    return FolderStore(tmp_path / "store")


def test_what_a_build_measured_is_lent_to_the_next(store, tmp_path):
    lent, facts = build(store, tmp_path, "a", facts={"used": False, "reloads": True})
    assert (lent, facts["kept"]) == (set(), "the first")
    lent, facts = build(store, tmp_path, "b")
    assert (lent, facts["kept"]) == ({"a"}, "with what was lent")
    assert build(store, tmp_path, "b")[1]["kept"] == "nothing new"
    assert kept(store) == {"a", "b"}
    described = json.loads(store.read(facts["place"].replace(".cache", ".json")))
    assert facts["place"].startswith("timing/tensorrt-8.6.0/")
    assert described["device"]["sm_count"] == 132
    assert (described["version"], described["driver"], described["cuda"]) == ("8.6.0", "580.159.04", "cu12")


@pytest.mark.parametrize(
    "changes",
    [
        {"tensorrt": "8.6.1"},
        {"cuda": "cu13"},
        {"gpu": replace(H200, sm_count=114)},
        {"gpu": replace(H200, compute_capability="sm89")},
        {"host": replace(HOST, driver="580.159.05")},
        {"host": replace(HOST, arch="aarch64")},
    ],
)
def test_versions_drivers_and_devices_have_caches_of_their_own(store, changes):
    assert loan(store, **changes).place.stem != loan(store).place.stem


def test_equal_gpus_share_one_whatever_they_are_called_and_wherever_they_are(store):
    same = loan(store, gpu=replace(H200, uuid="GPU-2"), host=replace(HOST, name="there"))
    assert same.place.stem == loan(store).place.stem
    portable = loan(store, device=None, driver=None)  # hardware compatible, driver ignored: measured here all the same
    assert portable.place.stem == loan(store).place.stem


def test_only_compilations_that_pin_none_are_lent_one(store):
    assert lent_cache(store, step("verify"), H200, HOST) is None
    assert lent_cache(store, step(inputs=["timing.cache"]), H200, HOST) is None
    assert lent_cache(store, step(), None, HOST) is None
    unknown = replace(step(), action=replace(step().action, toolchain={}))
    assert lent_cache(store, unknown, H200, replace(HOST, runtimes={})) is None
    assert lent_cache(store, unknown, H200, HOST).place.version == "8.6.0"


def test_builders_that_finish_at_once_keep_what_all_of_them_measured(store, tmp_path):
    slow = loan(store)
    assert not slow.lend(tmp_path / "given")
    build(store, tmp_path, "fast", facts={"used": False, "reloads": True})
    (tmp_path / "made").write_bytes(b"slow")
    slow.take_back(tmp_path / "made", {"used": False, "reloads": True}, union)
    assert slow.facts["kept"] == "merged with what another build had kept meanwhile"
    assert kept(store) == {"fast", "slow"}


def _builder(uri, folder, number):
    for turn in range(5):
        _lent, facts = build(open_store(uri), Path(folder) / str(number), f"{number}-{turn}", combine=union)
        while facts["kept"].startswith("no: others"):
            _lent, facts = build(open_store(uri), Path(folder) / str(number), f"{number}-{turn}", combine=union)


def test_no_measurement_of_many_builders_is_lost(store, tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_builder, args=(store.uri, str(tmp_path), number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert kept(store) == {f"{number}-{turn}" for number in range(3) for turn in range(5)}


def test_in_s3_too(s3_store_uri, tmp_path):
    store = open_store(s3_store_uri)
    build(store, tmp_path, "a", facts={"used": False, "reloads": True})
    slow = loan(store)
    assert slow.lend(tmp_path / "slow")
    assert build(store, tmp_path, "b")[0] == {"a"}
    (tmp_path / "made").write_bytes(b"a c")
    slow.take_back(tmp_path / "made", WELL, union)
    assert kept(store) == {"a", "b", "c"}


def test_what_tensorrt_would_not_load_again_is_not_kept(store, tmp_path):
    _lent, facts = build(store, tmp_path, "a", facts={"used": False, "reloads": False, "reload_refused": "Myelin"})
    assert facts["kept"] == "no: it cannot be loaded again (Myelin)"
    assert list(store.list("timing/")) == []


def test_a_cache_that_was_refused_gives_way_to_one_that_was_not(store, tmp_path):
    build(store, tmp_path, "poison", facts={"used": False, "reloads": True})
    lent, facts = build(store, tmp_path, "good", facts={"used": False, "reloads": True})
    assert (lent, facts["kept"]) == ({"poison"}, "instead of what was refused")
    assert kept(store) == {"good"}


def test_what_tensorrt_refuses_to_merge_stays_as_it_is(store, tmp_path):
    slow = loan(store)
    slow.lend(tmp_path / "given")
    build(store, tmp_path, "fast", facts={"used": False, "reloads": True})
    (tmp_path / "made").write_bytes(b"slow")
    slow.take_back(tmp_path / "made", {"used": False, "reloads": True}, refuse)
    assert slow.facts["kept"] == "no: another device"
    assert kept(store) == {"fast"}


@pytest.mark.parametrize("cut", [0, 30, 66])
def test_a_damaged_cache_is_not_lent_and_gives_way(store, tmp_path, cut):
    place = build(store, tmp_path, "measured", facts={"used": False, "reloads": True})[1]["place"]
    store.write(place, store.read(place)[:cut])
    lent, facts = build(store, tmp_path, "again", facts={"used": False, "reloads": True})
    assert lent == set()
    assert (facts["not_lent"], facts["kept"]) == ("it is damaged", "instead of what was damaged")
    assert build(store, tmp_path, "c")[0] == {"again"}


class Broken(FolderStore):
    """A store whose disk is full."""

    def write(self, path, data, *, if_absent=False, if_version=None):
        raise StoreError("No space left on device")


def test_a_store_that_takes_nothing_fails_no_build(tmp_path):
    _lent, facts = build(Broken(tmp_path / "store"), tmp_path, "a", facts={"used": False, "reloads": True})
    assert facts["kept"] == "no: No space left on device"


def test_a_build_that_makes_none_keeps_none(store, tmp_path):
    own: LentCache = loan(store)
    own.take_back(tmp_path / "none", WELL, never)
    assert own.facts["kept"] == "no: the build made none"


def use_caches(request):
    """Stage code: what TensorRT-RTX, which starts without a GPU but loads no timing cache there, says of two caches."""
    import tensorrt_rtx as rtx

    log, found = Log(lambda _fraction, _text: None), []
    config = rtx.Builder(log.for_runtime(rtx)).create_builder_config()
    for given in (request.inputs["base.cache"], None):
        timing = TimingCache(rtx, log, given)
        attached = [timing.attach(config, {"optimization_level": level}) for level in (None, 3)]
        timing.keep(config, request.output_dir)
        found.append({**timing.facts, "attached": [cache is not None for cache in attached]})
    none = TimingCache(rtx, log, None).attach(config, {"optimization_level": 0})
    said = {"errors": log.errors, "warnings": log.warnings}
    return StageResult({"timing.cache": "x"}, {"found": found, "at level 0": none is not None, **said})


def merge_caches(request):
    import tensorrt_rtx as rtx

    paths = request.inputs["base.cache"], request.inputs["more.cache"]
    return StageResult({}, {"refused": merge_with(rtx, *paths, request.output_dir)})


@pytest.fixture
def on_rtx(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install 'enginery[tensorrt-rtx]')")
    output = tmp_path / "out"
    output.mkdir()
    inputs = {name: tmp_path / name for name in ("base.cache", "more.cache")}
    for path in inputs.values():
        path.write_bytes(b"no timing cache")

    def run(function):
        entry, limits = f"{__name__}:{function.__name__}", Limits(timeout_s=120, memory_bytes=8 << 30)
        return run_stage("compile", {}, inputs, output, limits=limits, entry=entry).facts, output

    return run


def test_a_cache_that_tensorrt_does_not_load_is_told_from_one_that_it_uses(on_rtx):
    facts, output = on_rtx(use_caches)
    given, empty = facts["found"]
    assert (given["given"], given["used"], given["size_before"]) == (True, False, 15)
    assert "timing cache" in given["refused"]
    assert (empty["given"], empty["used"], "refused" in empty) == (False, False, False)
    for one in (given, empty):
        assert one["attached"] == [True, True]
        assert one["size_after"] == (output / "timing.cache").stat().st_size
        assert one["reloads"] is False
        assert "timing cache" in one["reload_refused"]
    assert facts["errors"] == []
    assert [words.partition(":")[0] for words in facts["warnings"]] == ["the timing cache is not used"]
    assert facts["at level 0"] is False


# As 8.6.0 says it, on an H100: of a cache of its own, and of one that it cannot read.
MYELIN = "1: [myelinCache.h::deserializeFromBuffer::52] Error Code 1: Myelin (Myelin error from unknown graph)"
ADVICE = "4: The timing cache will not be used!"
UNREADABLE = "1: [stdArchiveReader.cpp::StdArchiveReaderInitCommon::59] Error Code 1: Serialization (Serialization assertion failed)"


class SaysOnSetting:
    """A builder configuration that takes every cache, and logs errors while it does."""

    def __init__(self, log, said, *, takes=True):
        self._log, self._said, self._takes = log, said, takes

    def create_timing_cache(self, data):
        if data:
            self._log.errors += self._said
        return data

    def set_timing_cache(self, _cache, _ignore_mismatch):
        return self._takes


@pytest.mark.parametrize(
    ("said", "takes", "used", "words"),
    [
        ([], True, True, {}),
        ([MYELIN, ADVICE], True, True, {"without": MYELIN}),
        ([MYELIN, ADVICE], False, False, {"refused": f"{MYELIN}; {ADVICE}"}),
        ([UNREADABLE, ADVICE], True, False, {"refused": f"{UNREADABLE}; {ADVICE}"}),
        ([MYELIN, UNREADABLE, ADVICE], True, False, {"refused": f"{MYELIN}; {UNREADABLE}; {ADVICE}"}),
        ([ADVICE], True, False, {"refused": ADVICE}),
    ],
)
def test_a_cache_without_the_graph_compilers_part_is_used_and_an_unreadable_one_is_not(
    tmp_path, said, takes, used, words
):
    (tmp_path / "given.cache").write_bytes(b"kernels")
    log = Log(lambda _fraction, _text: None)
    timing = TimingCache(None, log, tmp_path / "given.cache")
    timing.attach(SaysOnSetting(log, said, takes=takes), {})
    assert {key: timing.facts[key] for key in ("used", "without", "refused") if key in timing.facts} == {
        "used": used,
        **words,
    }
    assert log.errors == []  # a later failure is not blamed on them
    assert bool(log.warnings) is not used


class Kernels:
    """TensorRT 8.6 as `merge_with` uses it: it merges what kernels took, logs what it says, and answers no."""

    __version__ = "8.6.0"

    def __init__(self, said, created=()):
        self._said, self._created, self.data = said, created, b""

    def Builder(self, logger):  # noqa: N802  TensorRT's name
        self._logger = logger
        return self

    def create_builder_config(self):
        return self

    def create_timing_cache(self, data):
        cache = Kernels(self._said)
        cache._logger, cache.data = self._logger, data
        self._logger.errors += self._created
        return cache

    def combine(self, other, _ignore_mismatch):
        self.data += other.data
        for words in self._said:
            self._logger.errors.append(words)
        return False

    def serialize(self):
        return self.data


OTHER = "made by another version or on another device"


@pytest.mark.parametrize(
    ("created", "said", "refused"),
    [
        ([MYELIN, ADVICE], [MYELIN], None),
        ([], [MYELIN], None),
        ([], [], OTHER),
        ([MYELIN, ADVICE], [], OTHER),  # what was said before is no reason
        ([MYELIN, ADVICE], [MYELIN, UNREADABLE], f"{MYELIN}; {UNREADABLE}"),
        ([UNREADABLE, ADVICE], [MYELIN], "; ".join([UNREADABLE, ADVICE] * 2)),
    ],
)
def test_8_merges_kernels_and_answers_no(tmp_path, monkeypatch, created, said, refused):
    monkeypatch.setattr(Log, "for_runtime", lambda self, _trt: self)
    (tmp_path / "base").write_bytes(b"one, ")
    (tmp_path / "more").write_bytes(b"two")
    assert merge_with(Kernels(said, created), tmp_path / "base", tmp_path / "more", tmp_path) == refused
    merged = tmp_path / "timing.cache"
    assert (merged.read_bytes() if merged.exists() else None) == (b"one, two" if refused is None else None)


def test_caches_that_tensorrt_does_not_load_are_not_merged(on_rtx):
    facts, output = on_rtx(merge_caches)
    assert "timing cache" in facts["refused"]
    assert list(output.iterdir()) == []


def test_a_build_that_records_its_own_is_lent_none(store):
    made = step()
    recording = Action("compile", 1, {**made.action.params, "reproducible": True}, {}, TOOLS)
    assert lent_cache(store, replace(made, action=recording), H200, HOST) is None
