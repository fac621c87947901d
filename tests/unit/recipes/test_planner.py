"""The planner: what runs again for each change, what waits, what gives way, and what every step says about why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from artifacts.host import Gpu, Host
from artifacts.records import ActionRecord
from artifacts.refs import ArtifactRef
from recipes.files import DatasetFiles, LocalFile, RecipeFiles
from tests.unit.recipes.simulated import FILES, GOOD, HOST, World, bundle, digest, recipe

PORTABLE = {
    "fetch:code", "fetch:weights", "fetch:calibration", "fetch:labelled", "reference:parity", "reference:labelled",
    "export", "simplify", "calibrate", "outliers", "type:int8", "type:fp16", "type:fp32",
    "verify:export", "verify:simplify", "verify:int8", "verify:fp16", "verify:fp32",
}  # fmt: skip
RTX = {
    f"{stage}:tensorrt-rtx:{gpu}:{precision}"
    for stage in ("compile", "publish")
    for gpu in ("sm89", "sm120")
    for precision in ("int8", "fp16")
}
ORT = {
    f"{stage}:onnxruntime:cpu:{precision}"
    for stage in ("compile", "verify", "publish")
    for precision in ("fp32", "int8")
}
CHECK = {"check:tensorrt-rtx"}
EVERYTHING = PORTABLE | CHECK | RTX | ORT
INT8 = {step for step in EVERYTHING if step.endswith(":int8")}


@pytest.fixture
def built() -> World:
    world = World()
    world.build(recipe())
    return world


def test_a_first_build_runs_every_step_once_and_after_what_it_needs():
    ran, planned = World().build(recipe())
    assert sorted(ran) == sorted(EVERYTHING)
    assert planned.fresh
    assert planned.status == 0
    assert [engine.state for engine in planned.engines] == ["cached"] * 6
    order = {step: index for index, step in enumerate(ran)}
    for earlier, later in [
        ("export", "simplify"),
        ("simplify", "calibrate"),
        ("calibrate", "type:int8"),
        ("type:int8", "verify:int8"),
        ("verify:int8", "compile:tensorrt-rtx:sm89:int8"),
        ("compile:tensorrt-rtx:sm89:int8", "publish:tensorrt-rtx:sm89:int8"),
        ("verify:onnxruntime:cpu:int8", "publish:onnxruntime:cpu:int8"),
    ]:
        assert order[earlier] < order[later]


def test_a_second_build_runs_nothing(built: World):
    ran, planned = built.build(recipe())
    assert ran == []
    assert all(step.state == "cached" for step in planned.steps)


def test_a_plan_before_the_first_build_says_that_everything_was_never_built():
    planned = World().plan(recipe())
    assert {step.state for step in planned.steps} == {"run"}
    assert {step.id for step in planned.ready} == {"fetch:code", "fetch:weights", "fetch:calibration", "fetch:labelled"}
    assert all(step.why == ("miss: never built",) for step in planned.steps)


@pytest.mark.parametrize("late", ["fetch:calibration", "fetch:labelled"])
def test_no_source_runs_before_its_data_was_read(late: str):
    world = World()
    for step in world.plan(recipe()).ready:
        if step.id != late:
            world.records[step.stage, step.action.key] = world.run(step)
    assert {step.id for step in world.plan(recipe()).ready} == {late}


AFTER_EXPORT = EVERYTHING - {step for step in EVERYTHING if step.startswith(("fetch", "reference"))} - {"export"}
CHANGES = {
    "opset": (lambda d: d["export"].update(opset=20), FILES, {"export"} | AFTER_EXPORT),
    "exporter": (lambda d: d["export"].update(exporter="torchscript"), FILES, {"export"} | AFTER_EXPORT),
    # Profiles are what simplify is checked in, what parity is measured at, and what compilers are told.
    "profile": (
        lambda d: d["profiles"]["bulk"].update(batch=[1, 64, 512]),
        FILES,
        EVERYTHING
        - {"export", "check:tensorrt-rtx", "calibrate", "type:int8", "type:fp16", "type:fp32", "reference:labelled"}
        - {step for step in ORT if step.startswith("compile")}  # which takes any shape
        - {step for step in EVERYTHING if step.startswith("fetch")},
    ),
    "precision": (
        lambda d: d["precision"].update(build=["int8", "bf16"]),
        FILES,
        {"type:bf16", "verify:bf16"} | {f"{s}:tensorrt-rtx:{g}:bf16" for s in ("compile", "publish") for g in ("sm89", "sm120")},
    ),
    "calibration sample": (
        lambda _d: None,
        replace(FILES, calibration=DatasetFiles("npz", digest("another"), FILES.calibration.path)),
        INT8 | {"fetch:calibration", "calibrate", "outliers"},
    ),
    "calibration count": (
        lambda d: d["precision"]["calibration"].update(samples=128),
        FILES,
        INT8 | {"fetch:calibration", "calibrate", "outliers"},
    ),
    "kept layers": (
        lambda d: d["precision"].update(keep=["/head/*"]),
        FILES,
        INT8 | {step for step in EVERYTHING if step.endswith(":fp16")},
    ),
    "weight": (
        lambda _d: None,
        replace(FILES, weights=LocalFile("weights.safetensors", digest("retrained"), 10, "w")),
        EVERYTHING - {"fetch:code", "fetch:calibration", "fetch:labelled"},
    ),
    "model code": (
        lambda _d: None,
        replace(FILES, code=bundle(model="import layers", layers="# changed")),
        EVERYTHING - {"fetch:weights", "fetch:calibration", "fetch:labelled"},
    ),
    "simplifier": (lambda d: d["export"].update(simplifier="onnxslim"), FILES, AFTER_EXPORT - {"verify:export"}),
    "target": (
        lambda d: d["targets"][0].update(gpus=["sm89", "sm120", "sm121"]),
        FILES,
        {f"{stage}:tensorrt-rtx:sm121:{precision}" for stage in ("compile", "publish") for precision in ("int8", "fp16")},
    ),
    "gate": (
        lambda d: d["acceptance"]["metric"].update(floor=0.9),
        FILES,
        {step for step in EVERYTHING if step.startswith("publish")},
    ),
    "held-out data": (
        lambda _d: None,
        replace(FILES, labelled=DatasetFiles("npz", digest("other"), FILES.labelled.path)),
        {"fetch:labelled", "reference:labelled"}
        | {step for step in EVERYTHING if step.startswith("verify")}
        # compile waits for the gate, but is not affected by it; publish states what was measured, which is equal here
    ),
    "workspace": (
        lambda d: d.update(build={"workspace": "1GiB"}),
        FILES,
        RTX,  # ONNX Runtime has no such option
    ),
    "time limit": (lambda d: d.update(build={"timeout": "5m"}), FILES, set()),
    "description": (lambda d: d.update(description="other words"), FILES, set()),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_runs_exactly_the_stages_that_it_touches(built: World, what: str):
    change, files, expected = CHANGES[what]
    ran, planned = built.build(recipe(change), files)
    assert set(ran) == expected
    assert len(ran) == len(set(ran))
    assert planned.fresh


@pytest.mark.parametrize(
    ("what", "step", "why"),
    [
        ("opset", "export", "miss: params.opset 18 -> 20"),
        ("calibration count", "fetch:calibration", "miss: params.samples 256 -> 128"),
        ("kept layers", "type:int8", 'miss: params.keep [] -> ["/head/*"]'),
        ("simplifier", "simplify", "miss: params.simplifier onnxsim -> onnxslim"),
        ("profile", "compile:tensorrt-rtx:sm89:fp16", "miss: params.profiles[0].inputs.image.max[0] 256 -> 512"),
        ("gate", "publish:tensorrt-rtx:sm89:fp16", "miss: params.gates.metric.floor 0.97 -> 0.9"),
        ("workspace", "compile:tensorrt-rtx:sm120:int8", "miss: params.workspace null -> 1073741824"),
    ],
)
def test_a_plan_names_the_value_that_changed(built: World, what: str, step: str, why: str):
    change, files, _expected = CHANGES[what]
    planned = {each.id: each for each in built.plan(recipe(change), files).steps}
    assert why in planned[step].why
    assert planned[step].state == "run"


def test_a_changed_module_is_named_in_the_plan(built: World):
    _change, files, _expected = CHANGES["model code"]
    planned = {step.id: step for step in built.plan(recipe(), files).steps}
    assert any("params.members.layers.py" in why for why in planned["fetch:code"].why)


def test_what_comes_after_a_miss_follows_it_unless_its_own_parameters_changed(built: World):
    planned = {step.id: step for step in built.plan(recipe(CHANGES["opset"][0])).steps}
    assert planned["export"].ready
    assert planned["simplify"].state == "follows"
    assert planned["simplify"].why == ("runs if export changes its output",)
    assert planned["reference:parity"].state == "cached"
    assert not planned["publish:tensorrt-rtx:sm89:int8"].ready


def test_an_equal_output_cuts_the_rebuild_off(built: World):
    built = World(same_bytes={"export"})
    built.build(recipe())
    ran, planned = built.build(recipe(CHANGES["exporter"][0]))
    assert ran == ["export"]
    assert planned.fresh


@pytest.mark.parametrize("package", ["torch", "onnx", "onnxscript", "onnxsim", "onnxruntime", "numpy"])
def test_a_new_version_of_a_tool_runs_the_stages_that_use_it(built: World, package: str):
    built.versions[package] += ".post1"
    users = {
        "torch": {"export", "reference:parity", "reference:labelled"},
        "onnxscript": {"export"},
        "onnxsim": {"simplify"},
        "numpy": {"reference:parity", "calibrate", "verify:export", "fetch:calibration"},
        "onnx": {"export", "simplify", "calibrate", "outliers", "type:int8", "verify:int8"},
        "onnxruntime": {"simplify", "calibrate", "type:fp16", "verify:fp16"},
    }[package]
    stale = {step.id: step for step in built.plan(recipe()).steps if step.state == "run"}
    assert users <= set(stale)
    for user in users:
        assert any(f"toolchain.{package} " in why for why in stale[user].why)


def test_a_new_runtime_version_rebuilds_its_engines_alone(built: World):
    built.host = replace(HOST, runtimes={"tensorrt-rtx": "1.8.0.9", "onnxruntime": "1.31.1"})
    ran, _planned = built.build(recipe())
    assert set(ran) == CHECK | RTX
    planned = built.plan(recipe())
    assert planned.engines[0].target == "tensorrt-rtx-1.8.0.9-sm89"


def test_another_cuda_flavour_of_one_runtime_version_compiles_anew(built: World):
    built.versions = {name: found for name, found in built.versions.items() if name != "tensorrt_rtx_cu13"}
    built.versions["tensorrt_rtx_cu12"] = "1.7.1.116"
    planned = {step.id: step for step in built.plan(recipe()).steps}
    assert planned["compile:tensorrt-rtx:sm89:int8"].why == ("miss: toolchain.cuda cu13 -> cu12",)
    assert {step.id for step in planned.values() if step.state == "run"} == {s for s in RTX if s.startswith("compile")}


@pytest.mark.parametrize("field", ["os", "arch"])
def test_another_platform_compiles_anew(built: World, field: str):
    built.host = replace(HOST, **{field: "other"})
    ran, _planned = built.build(recipe())
    assert {step for step in ran if step.startswith("compile")} == {s for s in EVERYTHING if s.startswith("compile")}


def test_the_host_name_enters_no_key(built: World):
    built.host = replace(HOST, name="elsewhere")
    assert built.build(recipe())[0] == []


def failing(**parity: float | None) -> dict:
    return {**GOOD, "parity": {**GOOD["parity"], **parity}}


def test_a_precision_that_fails_its_gate_gives_way_to_the_next():
    world = World(facts={"verify:int8": failing(relative_l2=0.9)})
    ran, planned = world.build(recipe(), targets=("tensorrt-rtx:sm89",))
    engine = planned.engines[0]
    assert (engine.asked, engine.given, engine.state) == ("int8", "fp16", "cached")
    assert [(trial.precision, trial.verdict.passed) for trial in engine.trials] == [("int8", False), ("fp16", True)]
    assert "relative_l2 0.9 > 0.25" in engine.trials[0].verdict.reasons
    assert "compile:tensorrt-rtx:sm89:int8" not in ran
    assert engine.publish.action.params["tried"] == [{"precision": "int8", "reasons": ["relative_l2 0.9 > 0.25"]}]


def test_when_no_precision_passes_the_target_fails_with_what_was_tried():
    world = World(facts={"verify:fp16": failing(non_finite=3), "verify:fp32": failing(cosine=0.1, relative_l2=None)})
    ran, planned = world.build(recipe(lambda d: d["precision"].update(build=["fp16"])), targets=("tensorrt-rtx:sm89",))
    assert planned.status == 1
    assert planned.engines[0].state == "failed"
    assert "fp16: 3 NaN or Inf in the outputs" in planned.engines[0].why
    assert "fp32: relative_l2 not finite > 0.0001" in planned.engines[0].why
    assert not any(step.startswith(("compile", "publish")) for step in ran)


def test_an_export_that_differs_from_its_source_is_compiled_for_nothing():
    world = World(facts={"verify:export": failing(relative_l2=0.5)})
    ran, planned = world.build(recipe())
    assert {engine.state for engine in planned.engines} == {"failed"}
    assert planned.engines[0].why.startswith("the exported graph fails: relative_l2 0.5")
    assert not any(step.startswith("compile") for step in ran)


def test_a_source_that_fails_its_gate_itself_is_told_and_no_exporter_is_blamed():
    """Of a graph that equals its source: wrong labels or weights, and nothing that more exports would explain."""
    poor = {**GOOD, "metric": {"name": "top1", "value": 0.1, "source": 0.1}}
    ran, planned = World(facts={"verify:export": poor}).build(recipe())
    assert planned.engines[0].why.startswith(
        "the exported graph fails: top1 0.1 < floor 0.97\nthe graph equals its source, whose own top1 is 0.1\n"
    )
    assert "explain:export" not in ran
    drawing = {**failing(relative_l2=1.2), "told": ["it draws random numbers"]}
    ran, planned = World(facts={"verify:export": drawing}).build(recipe())
    assert planned.engines[0].why.endswith("it draws random numbers")
    assert "explain:export" not in ran


@pytest.mark.parametrize(
    ("metric", "bounds"),
    [
        ({"value": 0.98, "source": 0.99}, {}),  # the floor holds, and the drop is too large
        ({"value": 0.4, "source": 1.0}, {"fp32": {"relative_l2": 0.5, "cosine": 0.5}}),  # too far away, by wide bounds
    ],
)
def test_a_source_that_passes_is_not_blamed_for_an_export_that_does_not(metric, bounds):
    def strict(document):
        document["acceptance"]["metric"]["max_drop"] = 0.0
        document["acceptance"] |= {"parity": bounds} if bounds else {}

    worse = {**GOOD, "metric": {"name": "top1", **metric}}
    ran, planned = World(facts={"verify:export": worse}).build(recipe(strict))
    assert "whose own" not in planned.engines[0].why
    assert "explain:export" in ran


def test_an_engine_that_fails_when_executed_gives_way_too():
    world = World(facts={"verify:onnxruntime:cpu:int8": failing(relative_l2=0.9)})
    _ran, planned = world.build(recipe(), targets=("onnxruntime",))
    assert [(e.asked, e.given) for e in planned.engines] == [("fp32", "fp32"), ("int8", "fp16")]


@pytest.mark.parametrize(
    ("target", "host", "words"),
    [
        ({"runtime": "tensorrt", "gpus": ["sm90"]}, HOST, "needs a host with tensorrt and an sm90 GPU"),
        (
            {"runtime": "tensorrt-rtx", "gpus": ["sm89"]},
            Host("bare", "linux", "x86_64"),
            "tensorrt-rtx is not installed here",
        ),
        (
            {"runtime": "tensorrt-rtx", "gpus": ["sm89"], "version": "1.8.0.9"},
            HOST,
            "tensorrt-rtx 1.8.0.9; 1.7.1.116 is installed",
        ),
        (
            {"runtime": "tensorrt", "gpus": ["sm90"]},
            replace(HOST, runtimes={"tensorrt": "8.6.0"}),
            "no such GPU is here",
        ),
    ],
)
def test_a_target_that_needs_another_host_waits_and_the_portable_stages_run(target, host, words):
    world = World(host=host)
    ran, planned = world.build(recipe(lambda d: d.update(targets=[target])))
    assert {engine.state for engine in planned.engines} == {"waiting"}
    assert words in planned.engines[0].why
    assert planned.status == 3
    assert set(ran) == PORTABLE - {"type:fp32", "verify:fp32"}


def test_a_failure_blocks_what_needs_it_and_nothing_else():
    _ran, before = World().build(recipe())
    key = next(step for step in before.steps if step.id == "calibrate").action.key
    world = World(failures={key: "bad data: 3 NaN"})
    ran, planned = world.build(recipe())
    states = {step.id: step.state for step in planned.steps}
    assert states["calibrate"] == "failed"
    assert states["type:int8"] == states["publish:tensorrt-rtx:sm89:int8"] == "blocked"
    assert states["publish:onnxruntime:cpu:fp32"] == "cached"
    assert planned.status == 1
    assert "calibrate" not in ran


def test_an_onnx_source_fetches_its_graph_and_data_and_keeps_its_opset():
    files = RecipeFiles(
        model=(
            LocalFile("model.onnx", digest("graph"), 5, "m.onnx"),
            LocalFile("model.onnx.data", digest("data"), 6, "m.onnx.data"),
        )
    )
    made = recipe(
        lambda d: d.update(
            source={"framework": "onnx", "model": {"file": "m.onnx"}},
            export={},
            outputs=None,
            acceptance={},
            precision={"build": ["fp16"]},
            targets=[{"runtime": "tensorrt-rtx", "gpus": ["sm89"]}],
        )
    )
    planned = {step.id: step for step in World().plan(made, files).steps}
    assert {"fetch:model", "fetch:model/model.onnx.data"} <= set(planned)
    assert planned["export"].after == ("fetch:model", "fetch:model/model.onnx.data")


@pytest.mark.parametrize("name", ["model.data", "w.bin", "weight_0", "metric", "model", "parts/a.bin"])
def test_external_data_may_have_any_name(name):
    """Each file is fetched, and enters the export's key, also where its name is that of another thing to fetch."""
    change = {
        "source": {"framework": "onnx", "model": {"file": "m.onnx"}},
        "precision": {"build": ["fp16"]},
        "targets": [{"runtime": "tensorrt-rtx", "gpus": ["sm89"]}],
    }
    made = recipe(lambda d: d.update(change, export={}, outputs=None, acceptance={}))

    def export_key(data: str) -> str:
        files = RecipeFiles(
            model=(
                LocalFile("model.onnx", digest("graph"), 5, "m.onnx"),
                LocalFile(name, digest(data), 6, name),
            )
        )
        world = World()
        fetched = [step for step in world.plan(made, files).steps if step.stage == "fetch"]
        assert {step.local.name for step in fetched} == {"model.onnx", name}
        for step in fetched:
            ref = ArtifactRef(step.local.digest, step.local.size, "x/y")
            world.records[step.stage, step.action.key] = ActionRecord(step.action.preimage(), {step.local.name: ref})
        planned = {step.id: step for step in world.plan(made, files).steps}
        assert set(planned["export"].inputs) == {"model.onnx", name}
        return planned["export"].action.key

    assert export_key("one") != export_key("another")


def test_selecting_a_target_plans_no_other():
    planned = World().plan(recipe(), targets=("tensorrt-rtx:sm120",))
    assert {engine.gpu for engine in planned.engines} == {"sm120"}
    assert not any("sm89" in step.id or "onnxruntime" in step.id for step in planned.steps)


def test_tf32_shares_the_fp32_graph_and_is_measured_and_compiled_by_itself():
    made = recipe(
        lambda d: d.update(
            precision={"build": ["fp32", "tf32"]}, targets=[{"runtime": "tensorrt-rtx", "gpus": ["sm89"]}]
        )
    )
    ran, planned = World().build(made)
    assert [step for step in ran if step.startswith("type")] == ["type:fp32"]
    compiled = {step.id: step.action for step in planned.steps if step.stage == "compile"}
    assert compiled["compile:tensorrt-rtx:sm89:tf32"].params["tf32"] is True
    assert compiled["compile:tensorrt-rtx:sm89:tf32"].key != compiled["compile:tensorrt-rtx:sm89:fp32"].key
    verified = {step.id: step.action.params.get("tf32") for step in planned.steps if step.stage == "verify"}
    assert verified == {"verify:export": None, "verify:simplify": None, "verify:fp32": None, "verify:tf32": True}


H200 = Gpu("NVIDIA H200", "GPU-1", "sm90", 150 << 30, 132, 6144, ecc=True)
GPU_HOST = replace(HOST, runtimes={"tensorrt": "8.6.0"}, gpus=(H200,), driver="570.86.15")


def classic(**build: object):
    def change(document: dict) -> None:
        document.update(targets=[{"runtime": "tensorrt", "gpus": ["sm90"]}], build=build)

    return change


TRT = {
    f"{stage}:tensorrt:sm90:{precision}" for stage in ("compile", "verify", "publish") for precision in ("int8", "fp16")
}


def test_on_a_gpu_host_engines_are_compiled_and_executed():
    world = World(host=GPU_HOST)
    ran, planned = world.build(recipe(classic()))
    assert set(ran) >= TRT
    verified = next(step for step in planned.steps if step.id == "verify:tensorrt:sm90:fp16").action
    assert verified.params["executor"] == "tensorrt"
    assert verified.toolchain["driver"] == "570"
    assert "model.plan" in verified.inputs
    assert planned.engines[0].publish.action.params["measured"]["engine"]["executed"] is True


OPTIONS = {
    "sparsity": ({"sparsity": True}, {"sparse_weights": True}),
    "tactic_sources": ({"tactic_sources": ["jit-convolutions", "cudnn"]}, {"tactic_sources": ["cudnn", "jit-convolutions"]}),
    "auxiliary_streams": ({"auxiliary_streams": 0}, {"max_aux_streams": 0}),
    "jetson": ({"device_class": "jetson"}, {"workspace": 256 << 20}),
    "workstation": ({"device_class": "workstation"}, {"workspace": 2 << 30}),
    "stated workspace": ({"device_class": "jetson", "workspace": "1GiB"}, {"workspace": 1 << 30}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_of_the_compiler_enters_what_it_compiles_and_nothing_else(name: str):
    build, params = OPTIONS[name]
    world = World(host=GPU_HOST)
    world.build(recipe(classic()))
    before = {step.id: step.action for step in world.plan(recipe(classic())).steps}
    ran, planned = world.build(recipe(classic(**build)))
    assert set(ran) == TRT
    after = {step.id: step.action for step in planned.steps}
    compiled = "compile:tensorrt:sm90:fp16"
    assert dict(after[compiled].params) == dict(before[compiled].params) | params


def test_the_options_of_one_target_leave_the_others_alone():
    def change(document: dict) -> None:
        targets = [{"runtime": "tensorrt", "gpus": ["sm90"]}, {"runtime": "onnxruntime", "precision": ["int8"]}]
        document.update(targets=targets, build={"workspace": "1GiB", "optimization_level": 2})

    def own(document: dict) -> None:
        change(document)
        document["targets"][0]["build"] = {"workspace": "2GiB", "sparsity": True}

    world = World(host=replace(GPU_HOST, runtimes=GPU_HOST.runtimes | {"onnxruntime": "1.31.1"}))
    world.build(recipe(change))
    ran, planned = world.build(recipe(own))
    assert set(ran) == TRT
    params = next(step for step in planned.steps if step.id == "compile:tensorrt:sm90:int8").action.params
    assert (params["workspace"], params["optimization_level"], params["sparse_weights"]) == (2 << 30, 2, True)


def test_a_weakly_typed_compiler_gets_the_fp32_graph_and_is_judged_when_it_is_executed():
    def weak(document: dict) -> None:
        classic(typing="weak")(document)
        document["precision"].update(build=["fp16", "int8"], keep=["head/*"])

    world = World(host=GPU_HOST, facts={"verify:tensorrt:sm90:fp16": failing(relative_l2=0.5)})
    ran, planned = world.build(recipe(weak))
    steps = {step.id: step for step in planned.steps}
    fp16, int8 = steps["compile:tensorrt:sm90:fp16"].action, steps["compile:tensorrt:sm90:int8"].action
    fp32 = steps["type:fp32"].record.outputs["model.onnx"].digest
    assert fp16.inputs["model.onnx"] == fp32
    assert (fp16.params["typing"], fp16.params["precision"], fp16.params["keep"]) == ("weak", "fp16", ["head/*"])
    assert int8.inputs["model.onnx"] != fp32  # Q/DQ pairs are in the graph
    assert "verify:fp16" not in ran
    assert [(engine.asked, engine.given) for engine in planned.engines] == [("fp16", "fp32"), ("int8", "int8")]
    assert "keep" not in steps["compile:tensorrt:sm90:fp32"].action.params


def test_tensorrt_calibrates_once_and_what_other_options_compile_uses_it_again():
    def calibrated(document: dict, **build: object) -> None:
        classic(**build)(document)
        document["precision"].update(int8="calibrator")

    world = World(host=GPU_HOST)
    ran, planned = world.build(recipe(calibrated))
    steps = {step.id: step for step in planned.steps}
    cache = steps["calibrate:tensorrt:sm90"]
    assert cache.action.params == {
        "runtime": "tensorrt",
        "gpu": "sm90",
        "method": "entropy",
        "batch": 8,
        "tensors": {"image": {"dtype": "float32", "shape": ["batch", 1, "height", "width"]}},
    }
    assert set(cache.action.inputs) == {"model.onnx", "dataset.safetensors"}
    assert cache.action.toolchain["tensorrt"] == "8.6.0"
    compiled = steps["compile:tensorrt:sm90:int8"].action
    assert compiled.inputs["calibration.cache"] == cache.record.outputs["calibration.cache"].digest
    assert (compiled.params["typing"], compiled.params["calibrator"]) == ("weak", "entropy")
    assert {"calibrate", "type:int8"}.isdisjoint(ran)
    ran, _planned = world.build(recipe(lambda d: calibrated(d, optimization_level=5)))
    assert set(ran) == TRT
    ran, _planned = world.build(
        recipe(lambda d: (calibrated(d), d["precision"]["calibration"].update(method="minmax")))
    )
    assert set(ran) == {"calibrate:tensorrt:sm90"} | {step for step in TRT if step.endswith("int8")}


def test_plugins_enter_the_key_by_their_digest_and_go_where_the_engine_goes():
    name = "plugin-aaaaaaaaaaaaaaaa.so"
    library = LocalFile(name, "a" * 64, 10, "/anywhere/plugins/deform.so")
    files = replace(FILES, plugins={library.digest: library})
    made = recipe(classic(plugins=[{"file": "plugins/deform.so", "sha256": "a" * 64}]))
    world = World(host=GPU_HOST)
    ran, planned = world.build(made, files)
    assert set(ran) >= TRT | {f"fetch:{name}"}
    steps = {step.id: step for step in planned.steps}
    for step in TRT:
        assert name in steps[step].action.inputs
    moved = replace(files, plugins={library.digest: replace(library, address="/else/where.so")})
    assert world.build(made, moved)[0] == []
    newer = replace(files, plugins={"b" * 64: replace(library, digest="b" * 64)})
    ran, _planned = world.build(recipe(classic(plugins=[{"file": "plugins/deform.so", "sha256": "b" * 64}])), newer)
    assert set(ran) == TRT | {f"fetch:{name}"}


def test_a_graph_that_only_plugins_can_run_is_judged_when_its_engine_is_executed():
    library = LocalFile("plugin-aaaaaaaaaaaaaaaa.so", "a" * 64, 10, "a.so")
    files = replace(FILES, plugins={library.digest: library})
    options = {"plugins": [{"file": "a.so", "sha256": "a" * 64}]}
    unknown = {"executed": False, "reason": "it needs plugins", "plugin": True}
    facts = {f"verify:{graph}": unknown for graph in ("export", "simplify", "fp16", "fp32", "int8")}
    world = World(host=GPU_HOST, facts=facts | {"verify:tensorrt:sm90:int8": failing(relative_l2=0.9)})
    _ran, planned = world.build(recipe(classic(**options)), files)
    assert [(engine.asked, engine.given) for engine in planned.engines] == [("int8", "fp16"), ("fp16", "fp16")]
    steps = {step.id: step.action for step in planned.steps}
    assert steps["verify:export"].params["plugins"] is steps["simplify"].params["plugins"] is True
    assert "plugins" not in steps["verify:tensorrt:sm90:fp16"].params

    def portable(document: dict) -> None:
        classic()(document)
        document["targets"] = [{"runtime": "tensorrt-rtx", "gpus": ["sm89"]}, *document["targets"]]
        document["targets"][1]["build"] = options

    elsewhere = World(facts=facts)  # no GPU: nothing was executed, so nothing passes
    _ran, planned = elsewhere.build(recipe(portable), files, targets=("tensorrt-rtx",))
    assert {engine.state for engine in planned.engines} == {"failed"}
    assert "not executed: it needs plugins" in planned.engines[0].why


PINS = {
    "timing_cache": {"file": "pinned/timing.cache", "sha256": "a" * 64},
    "layers": {"file": "pinned/layers.json", "sha256": "b" * 64},
}


def pinned_files(folder: str = "/anywhere") -> RecipeFiles:
    names = {"timing_cache": "timing.cache", "layers": "expected-layers.json"}
    pins = {
        (option, pin["sha256"]): LocalFile(names[option], pin["sha256"], 10, f"{folder}/{pin['file']}")
        for option, pin in PINS.items()
    }
    return replace(FILES, pins=pins)


def test_what_is_pinned_of_an_earlier_build_enters_what_is_compiled_by_its_digest():
    world = World(host=GPU_HOST)
    world.build(recipe(classic()))
    made = recipe(classic(reproducible=True, **PINS))
    ran, planned = world.build(made, pinned_files())
    assert set(ran) == TRT | {f"fetch:timing.cache-{'a' * 16}", f"fetch:expected-layers.json-{'b' * 16}"}
    action = next(step for step in planned.steps if step.id == "compile:tensorrt:sm90:fp16").action
    assert (action.params["timing_cache"], action.params["reproducible"]) == ("pinned", True)
    assert {"timing.cache", "expected-layers.json"} <= set(action.inputs)
    assert world.build(made, pinned_files("/elsewhere"))[0] == []
    ran, _planned = world.build(recipe(classic(timing_cache=PINS["timing_cache"])), pinned_files())
    assert set(ran) == TRT


class Recording(World):
    """A world whose reproducible compilations write what can be pinned, as `tasks.engines.trt` does."""

    def run(self, step):
        record = super().run(step)
        if step.action.params.get("reproducible"):
            for name in ("timing.cache", "layers.json"):
                record.outputs[name] = ArtifactRef(digest(f"{name} {step.action.key}"), 100, "x/y")
        return record


def test_a_reproducible_engine_is_published_with_what_it_can_be_built_again_from():
    world = Recording(host=GPU_HOST)
    _ran, planned = world.build(recipe(classic(reproducible=True)))
    for engine in planned.engines:
        ranges = {"calibration.json"} if engine.given == "int8" else set()
        assert set(engine.publish.action.inputs) == {"model.plan", "timing.cache", "layers.json"} | ranges
        assert "timing_cache" not in engine.compile.action.params
    _ran, planned = world.build(recipe(classic()))
    files = {name for engine in planned.engines for name in engine.publish.action.inputs}
    assert files == {"model.plan", "calibration.json"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (classic(reproducible=True, timing_cache=PINS["timing_cache"]), "begin with TensorRT 10.8"),
        (classic(refit="stripped"), "stripped plans begin with TensorRT 10.0"),
        (classic(weight_streaming=True), "weight streaming begins with TensorRT 10.0"),
        (classic(hardware_compatibility="same-compute-capability"), "begins with TensorRT 10.9"),
    ],
)
def test_what_the_installed_version_cannot_do_fails_when_it_is_planned(change, words: str):
    world = World(host=GPU_HOST)
    ran, planned = world.build(recipe(change))
    assert {engine.state for engine in planned.engines} == {"failed"}
    assert words in planned.engines[0].why
    assert not any(step.startswith("compile") for step in ran)
    elsewhere = World().plan(recipe(change))
    assert {engine.state for engine in elsewhere.engines} == {"waiting"}


def test_an_installed_version_without_calibrators_says_so():
    world = World(host=replace(GPU_HOST, runtimes={"tensorrt": "11.4.0.106"}))
    _ran, planned = world.build(
        recipe(lambda d: (classic()(d), d["precision"].update(int8="calibrator", build=["int8"])))
    )
    assert planned.engines[0].trials[0].verdict.reasons[0].startswith("TensorRT 11.4.0.106 has no calibrators")
    assert planned.engines[0].given == "fp16"


@pytest.mark.parametrize(
    ("policy", "driver", "stale"),
    [
        ("branch", "570.99.01", False),
        ("branch", "580.10.00", True),
        ("exact", "570.99.01", True),
        ("ignore", "580.10.00", False),
    ],
)
def test_a_new_driver_rebuilds_by_the_policy_of_the_recipe(policy: str, driver: str, stale: bool):
    made = recipe(lambda d: (classic()(d), d.update(driver=policy)))
    world = World(host=GPU_HOST)
    world.build(made)
    world.host = replace(GPU_HOST, driver=driver)
    ran, _planned = world.build(made)
    assert set(ran) == (TRT if stale else set())


@pytest.mark.parametrize(
    "gpu",
    [
        replace(H200, name="NVIDIA H100"),
        replace(H200, sm_count=114),
        replace(H200, l2_bytes=50 << 20),
        replace(H200, bus_width_bits=5120),
        replace(H200, ecc=False),
        replace(H200, memory_bytes=80 << 30),
    ],
)
def test_another_device_of_the_same_compute_capability_compiles_anew_unless_plans_are_portable(gpu: Gpu):
    for portable in ("none", "ampere+"):
        made = recipe(classic(hardware_compatibility=portable))
        world = World(host=GPU_HOST)
        world.build(made)
        world.host = replace(GPU_HOST, gpus=(gpu,))
        ran, _planned = world.build(made)
        assert set(ran) == (TRT if portable == "none" else set())


def test_which_of_several_equal_gpus_it_is_enters_no_key():
    world = World(host=GPU_HOST)
    world.build(recipe(classic()))
    world.host = replace(GPU_HOST, gpus=(replace(H200, uuid="GPU-2"),))
    assert world.build(recipe(classic()))[0] == []


def test_labelled_data_run_in_batches_that_every_profile_of_the_batch_axis_admits():
    made = recipe(
        lambda d: d["profiles"].update(
            online={"batch": [1, 1, 4], "height": [8, 8, 8], "width": [8, 8, 8]},
            bulk={"batch": [1, 2, 6], "height": [8, 8, 8], "width": [8, 8, 8]},
        )
    )
    planned = {step.id: step for step in World().build(made)[1].steps}
    assert planned["verify:int8"].action.params["batch"] == planned["reference:labelled"].action.params["batch"] == 6


def test_the_range_of_seeded_inputs_concerns_only_what_draws_them():
    """Data sets, calibration and engines know an input by its type and shape."""
    world = World(same_bytes={"export", "simplify"})
    world.build(recipe())
    ran, planned = world.build(recipe(lambda d: d["inputs"]["image"].update(low=0.0, high=1.0)))
    # The new reference is other bytes, so every graph is measured against it again; the figures come out the same.
    assert set(ran) == {"export", "simplify", "outliers", "reference:parity"} | {
        step.id for step in planned.steps if step.stage == "verify"
    }


def test_another_order_of_precisions_publishes_what_lost_or_gained_by_it_and_compiles_nothing(built: World):
    ran, _planned = built.build(recipe(lambda d: d["precision"].update(build=["fp16", "int8"])))
    assert set(ran) == {step for step in RTX if step.startswith("publish")}


def test_a_less_wanted_precision_leaves_what_is_published_alone(built: World):
    ran, _planned = built.build(recipe(lambda d: d["precision"].update(build=["int8", "fp16", "fp32"])))
    assert {step for step in ran if step.startswith("publish")} == {
        "publish:tensorrt-rtx:sm89:fp32",
        "publish:tensorrt-rtx:sm120:fp32",
    }


def test_a_fallback_that_the_target_cannot_have_is_not_tried():
    world = World(facts={"verify:fp16": failing(non_finite=1)})
    made = recipe(
        lambda d: d.update(
            targets=[{"runtime": "tensorrt-rtx", "gpus": ["sm75"]}],
            precision={"build": ["fp16"], "fallback": {"fp16": ["fp32"]}},
        )
    )
    ran, planned = world.build(made)
    assert planned.engines[0].state == "failed"
    assert "fp32: TensorRT-RTX does not compile fp32 for sm75" in planned.engines[0].why
    assert "type:fp32" not in ran


def timed(document):
    document["benchmark"] = {"batches": [1], "compare": ["torch", "onnxruntime"], "seconds": 1.0}


def test_only_engines_that_are_executed_are_timed_and_before_they_are_published():
    ran, planned = World().build(recipe(timed))
    order = {step: index for index, step in enumerate(ran)}
    names = [step for step in ran if step.startswith("benchmark:")]
    assert sorted(names) == ["benchmark:onnxruntime:cpu:fp32", "benchmark:onnxruntime:cpu:int8"]
    for name in names:
        engine = name.partition(":")[2]
        assert order[f"verify:{engine}"] < order[name] < order[f"publish:{engine}"]
    assert planned.fresh


def test_a_benchmark_depends_on_the_engine_the_processor_and_what_it_is_compared_with():
    world = World(host=replace(HOST, cpu="a"))
    world.build(recipe(timed))
    step = next(step for step in world.plan(recipe(timed)).steps if step.id == "benchmark:onnxruntime:cpu:fp32")
    assert set(step.inputs) == {
        "model.onnx", "graph/model.onnx", "source/code.tar", "source/weights.safetensors",
    }  # fmt: skip
    world.host = replace(HOST, cpu="b")
    ran, _planned = world.build(recipe(timed))
    assert set(ran) == {
        f"{stage}:onnxruntime:cpu:{precision}" for stage in ("benchmark", "publish") for precision in ("fp32", "int8")
    }
    world.versions["torch"] = "2.14.0"
    ran, _planned = world.build(recipe(timed))
    assert {step for step in ran if step.startswith("benchmark")} == {
        "benchmark:onnxruntime:cpu:fp32",
        "benchmark:onnxruntime:cpu:int8",
    }


def test_other_figures_of_the_same_measurement_publish_nothing_again():
    world = World()
    world.build(recipe(timed))
    lost = [key for key in world.records if key[0] == "benchmark"]
    for key in lost:
        del world.records[key]
    world.facts["benchmark"] = {"other": "figures"}
    ran, planned = world.build(recipe(timed))
    assert sorted(ran) == ["benchmark:onnxruntime:cpu:fp32", "benchmark:onnxruntime:cpu:int8"]
    assert planned.fresh


def test_asking_for_a_benchmark_changes_no_other_key(built):
    ran, _planned = built.build(recipe(timed))
    assert {step.partition(":")[0] for step in ran} == {"benchmark", "publish"}
    assert all("onnxruntime" in step for step in ran)


@pytest.mark.parametrize(("version", "graph"), [("8.6.0", "int8"), ("10.16.1.11", "int8-fp16")])
def test_mixed_int8_is_typed_where_the_compiler_reads_half_pairs(version, graph):
    """TensorRT 8.6 reads no opset that has them: it gets the int8 graph, and may lower the rest of it."""
    gpu = Gpu("NVIDIA H200", "GPU-1", "sm90", 1)
    world = World(host=replace(HOST, gpus=(gpu,), runtimes={"tensorrt": version}))
    made = recipe(
        lambda d: d.update(
            precision=d["precision"] | {"build": ["int8-fp16"], "fallback": {}, "keep": ["/head/*"]},
            targets=[{"runtime": "tensorrt", "gpus": ["sm90"]}],
        )
    )
    ran, planned = world.build(made)
    assert {step for step in ran if step.startswith("type:")} == {f"type:{graph}"}
    (engine,) = planned.engines
    assert (engine.state, engine.given, engine.typed) == ("cached", "int8-fp16", graph)
    params = engine.compile.action.params
    assert params["precision"] == "int8-fp16"
    assert params.get("keep") == (["/head/*"] if graph == "int8" else None)
    assert engine.publish.action.params["calibration"] is not None


UNREAD = {
    "target": "tensorrt-rtx 1.7.1.116", "by": "its parser", "state": "no", "words": "the parser refuses 1 node(s)",
    "advice": "see the nodes", "refused": 1,
    "nodes": [
        {
            "index": 8, "name": "head/nonzero", "operator": "NonZero", "location": "node 8 of 9, makes found",
            "words": "not supported", "advice": "use a mask",
        }
    ],
}  # fmt: skip


def test_an_operator_that_a_target_refuses_fails_that_target_alone_with_the_node_before_anything_is_compiled():
    world = World(facts={"check": UNREAD})
    ran, planned = world.build(recipe())
    assert not [step for step in ran if step.startswith("compile:tensorrt-rtx")]
    assert {engine.runtime: engine.state for engine in planned.engines} == {
        "tensorrt-rtx": "failed",
        "onnxruntime": "cached",
    }
    assert planned.status == 1
    assert planned.engines[0].why.splitlines() == [
        "tensorrt-rtx 1.7.1.116 does not read the model: the parser refuses 1 node(s)",
        "  NonZero 'head/nonzero' (node 8 of 9, makes found): not supported",
        "    next: use a mask",
    ]
    assert set(ran) >= ORT


@pytest.mark.parametrize(("kind", "gives_way"), [("no kernel", True), ("unsupported operator", True), ("crash", False)])
def test_a_precision_that_the_compiler_refuses_gives_way_to_the_next(kind, gives_way):
    world, made = World(), recipe(lambda d: d["targets"].pop())
    while (planned := world.plan(made)).ready:
        for step in planned.ready:
            if step.id == "compile:tensorrt-rtx:sm89:int8":
                world.failures[step.action.key] = f"{kind}: said the compiler\nand more"
            else:
                world.records[step.stage, step.action.key] = world.run(step)
    first, other = planned.engines[0], next(one for one in planned.engines if (one.gpu, one.asked) == ("sm120", "int8"))
    assert (other.given, other.state) == ("int8", "cached")
    assert (first.given, first.state) == (("fp16", "cached") if gives_way else ("int8", "failed"))
    assert planned.status == (0 if gives_way else 1)
    if gives_way:
        assert [trial.verdict.passed for trial in first.trials] == [False, True]
        assert first.publish.action.params["tried"] == [
            {"precision": "int8", "reasons": [f"{kind}: said the compiler"]}
        ]


def test_the_last_precision_that_the_compiler_refuses_fails_the_target():
    world, made = World(), recipe(lambda d: (d["targets"].pop(), d["precision"].update(build=["int8"], fallback={})))
    while (planned := world.plan(made)).ready:
        for step in planned.ready:
            if step.stage == "compile":
                world.failures[step.action.key] = "no kernel: said the compiler"
            else:
                world.records[step.stage, step.action.key] = world.run(step)
    assert {engine.state for engine in planned.engines} == {"failed"}
    assert planned.status == 1


def test_a_typed_graph_that_an_installed_version_does_not_parse_gives_way_before_it_is_made():
    host = replace(HOST, runtimes={"tensorrt": "10.1.0.27"}, gpus=())
    made = recipe(
        lambda d: (
            d.update(targets=[{"runtime": "tensorrt", "gpus": ["sm89"]}]),
            d["precision"].update(build=["bf16"], fallback={"bf16": ["fp16"]}),
        )
    )
    ran, planned = World(host=host).build(made)
    assert "type:bf16" not in ran
    assert "type:fp16" in ran
    (engine,) = planned.engines
    assert engine.trials[0].verdict.reasons == (
        "TensorRT 10.1.0.27 reads ONNX up to opset 20, and a graph in bf16 has opset 22 or later",
    )


def test_a_long_table_of_refused_nodes_is_cut_and_says_so():
    many = {**UNREAD, "nodes": UNREAD["nodes"] * 25}
    _ran, planned = World(facts={"check": many}).build(recipe())
    assert planned.engines[0].why.endswith("and 5 more: enginery inspect tells all of a file's")


@pytest.mark.parametrize(("opset", "refused"), [(18, True), (17, False)])
def test_a_tensorrt_that_is_not_here_is_judged_by_the_opset_that_it_reads(opset, refused):
    facts = {
        "export": {"opset": opset},
        "check": {**UNREAD, "nodes": [], "words": "reads opset 17 at most", "advice": "lower it"},
    }
    made = recipe(
        lambda d: d.update(
            targets=[{"runtime": "tensorrt", "gpus": ["sm80"], "version": "8.6.1.6"}],
            source={"framework": "onnx", "model": {"file": "m.onnx"}},
            export={},
        )
    )
    files = replace(FILES, code=None, weights=None, model=(LocalFile("model.onnx", digest("m"), 10, "m.onnx"),))
    ran, planned = World(facts=facts).build(made, files)
    assert ("check:tensorrt:8.6.1.6" in ran) is refused
    states = {engine.state for engine in planned.engines}
    assert states == ({"failed"} if refused else {"waiting"})
    assert not refused or planned.engines[0].why.endswith("reads opset 17 at most\n    next: lower it")


def test_onnx_runtime_is_asked_only_about_operators_outside_the_standard():
    library = LocalFile("plugin-aaaaaaaaaaaaaaaa.so", "a" * 64, 10, "/anywhere/plugins/deform.so")

    def with_plugins(document):
        document["targets"] = [
            {
                "runtime": "tensorrt",
                "gpus": ["sm90"],
                "build": {"plugins": [{"file": "deform.so", "sha256": "a" * 64}]},
            },
            {"runtime": "onnxruntime", "precision": ["fp32"]},
        ]

    world = World(facts={"export": {"domains": {"my": ["Deform"]}}, "check": UNREAD})
    ran, planned = world.build(recipe(with_plugins), replace(FILES, plugins={library.digest: library}))
    assert "check:onnxruntime" in ran
    assert [engine.state for engine in planned.engines] == ["waiting", "waiting", "failed"]


def test_why_an_exported_graph_is_wrong_is_looked_for_only_where_it_is_and_told():
    wrong = {**GOOD, "parity": {**GOOD["parity"], "relative_l2": 0.5}}
    found = [
        {
            "axis": "batch",
            "at": "batch 256 instead of 1",
            "node": "/Mul",
            "operator": "Mul",
            "words": "the constant is [1]",
        }
    ]
    world = World(facts={"verify:export": wrong, "explain": {"found": found, "exports": 2}})
    ran, planned = world.build(recipe())
    assert "explain:export" in ran
    assert {engine.state for engine in planned.engines} == {"failed"}
    assert planned.engines[0].why.splitlines()[1:] == [
        "what the exporter took from its sample input:",
        "  axis 'batch' (batch 256 instead of 1): Mul '/Mul': the constant is [1]",
        "    next: compute it from tensors and their shapes (torch.where, x.size()), or give the axis a fixed size",
    ]
    world.facts["explain"] = {"found": [], "exports": 2}
    world.records = {key: one for key, one in world.records.items() if key[0] != "explain"}
    _ran, planned = world.build(recipe())
    assert "2 more exports with other samples gave the same graph" in planned.engines[0].why


def test_an_exported_graph_that_does_not_run_at_all_is_explained_too():
    world = World()
    while planned := world.plan(recipe()):
        step = next((one for one in planned.ready if one.id == "verify:export"), None)
        if step is not None:
            break
        for one in planned.ready:
            world.records[one.stage, one.action.key] = world.run(one)
    world.failures[step.action.key] = "case online/max: output has shape [2], the source gave [4]"
    planned = world.plan(recipe())
    assert "explain:export" in {one.id for one in planned.ready}
    assert planned.engines[0].why.startswith("the exported graph fails: case online/max")
