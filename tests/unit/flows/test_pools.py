"""Templates of work pools, as Prefect fills them in: by their own schema, and by those of what reads the result.

Docker's model of a container checks the Docker template; Prefect's workers and the schema of Kubernetes are used where they
are installed, which `make test-long` does.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from docker.types import HostConfig
from jsonschema import Draft202012Validator
from prefect.utilities.templating import apply_values, find_placeholders
from prefect.workers.base import BaseJobConfiguration
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker

from enginery.output import StoppedError
from enginery.pool_commands import filled

ROOT = Path(__file__).resolve().parents[3]
KINDS = ("process", "docker", "kubernetes")
IMAGE = "image=registry.example.com:5000/enginery@sha256:" + "0123456789abcdef" * 4
H100 = "gpu_product=NVIDIA-H100-80GB-HBM3"
GPU, PORTABLE = "gpu-sm90-trt10.16", "portable"
ASKED = {"process": [], "docker": [IMAGE], "kubernetes": [IMAGE, H100]}
# Secret blocks and variables of a server are tested with one (tests/integration).
PLACES = {"prefect.variables.enginery_store": "s3://models/engines"}


def template(kind: str) -> dict[str, Any]:
    return json.loads((ROOT / "flows" / "pools" / f"{kind}.json").read_text())


def placeholders(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set().union(*map(placeholders, value.values()))
    if isinstance(value, list):
        return set().union(*map(placeholders, value))
    found = find_placeholders(value) if isinstance(value, str) else ()
    return {one.name for one in found}  # Prefect's server takes variables and blocks in defaults alone


def rendered(name: str, kind: str, *settings: str, **asked: Any) -> dict[str, Any]:
    """Return what a worker makes of a template and the job variables of a deployment, as Prefect does it."""
    document = filled(name, kind, list(settings))
    defaults = BaseJobConfiguration._get_base_config_defaults(document["variables"]["properties"])
    return apply_values(document["job_configuration"], {**defaults, **asked})


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_is_a_schema_whose_variables_are_all_used_and_all_explained(kind: str):
    document = template(kind)
    variables = document["variables"]
    Draft202012Validator.check_schema(variables)
    assert placeholders(document["job_configuration"]) | {"env"} == set(variables["properties"])
    for variable, schema in variables["properties"].items():
        assert schema["title"], variable
        assert schema["description"], variable
        for value in (*schema.get("examples", ()), *([schema["default"]] if "default" in schema else ())):
            Draft202012Validator(schema).validate(value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_pinned_and_a_gpu_is_named(kind: str):
    document = filled(GPU, kind, ASKED[kind])
    given = {
        name: schema["default"] for name, schema in document["variables"]["properties"].items() if "default" in schema
    }
    Draft202012Validator(document["variables"]).validate(given)
    for settings in (["image=enginery"], ["image=enginery:latest"], ["image=localhost:5000/enginery"]):
        if kind != "process":
            with pytest.raises(StoppedError, match="pinned"):
                filled(PORTABLE, kind, settings)
    if kind == "kubernetes":
        with pytest.raises(StoppedError, match="gpu_product"):
            filled(GPU, kind, [IMAGE])
        filled(PORTABLE, kind, [IMAGE])
    with pytest.raises(StoppedError, match="no such variable"):
        filled(GPU, kind, ["gpu=3"])


def test_a_process_takes_the_gpus_that_its_pool_may_use():
    assert ProcessJobConfiguration(**rendered(GPU, "process")).env == {}
    chosen = ProcessJobConfiguration(**rendered(GPU, "process", "cuda_visible_devices=1"))
    assert chosen.env == {"CUDA_VISIBLE_DEVICES": "1"}
    assert set(template("process")["job_configuration"]) == set(
        ProcessWorker.get_default_base_job_template()["job_configuration"]
    )


def test_a_container_sees_gpus_only_where_its_pool_has_them():
    for name, runtime, visible in ((GPU, "nvidia", "all"), (PORTABLE, "runc", "void")):
        configuration = rendered(name, "docker", IMAGE)
        assert configuration["env"]["NVIDIA_VISIBLE_DEVICES"] == visible
        options = configuration["container_create_kwargs"]
        host = HostConfig("1.43", binds=configuration["volumes"], **options)
        assert (host["Runtime"], host["ShmSize"], host["Init"]) == (runtime, 2 << 30, True)
        assert "/tmp:/tmp" in host["Binds"]  # where GPUs' locks are
        assert configuration["privileged"] is False


def test_a_pod_gets_gpus_of_one_product():
    def pod(name: str, *settings: str, **asked: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        configuration = rendered(name, "kubernetes", IMAGE, *settings, **asked)
        return configuration, configuration["job_manifest"]["spec"]["template"]["spec"]

    configuration, spec = pod(GPU, H100)
    assert spec["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert spec["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 1}
    assert spec["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert "NVIDIA_VISIBLE_DEVICES" not in configuration["env"]  # the device plugin's
    configuration, spec = pod(PORTABLE)
    assert spec.get("nodeSelector", {}) == {}
    assert spec["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 0}
    assert spec["tolerations"] == []
    assert configuration["env"]["NVIDIA_VISIBLE_DEVICES"] == "void"  # else images show all
    assert pod(GPU, H100, gpus=2)[1]["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 2}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
@pytest.mark.parametrize("name", [GPU, PORTABLE])
def test_prefects_own_workers_take_what_a_template_becomes(kind: str, name: str, monkeypatch: pytest.MonkeyPatch):
    for folder in os.environ.get("ENGINERY_WORKERS", "").split(os.pathsep):
        monkeypatch.syspath_prepend(folder) if folder else None
    library = pytest.importorskip(
        f"prefect_{kind}.worker", reason=f"prefect-{kind} is not installed (make test-long does)"
    )
    worker = getattr(library, f"{kind.capitalize()}Worker")
    default = worker.get_default_base_job_template()
    document = template(kind)
    assert set(document["job_configuration"]) <= set(default["job_configuration"])

    class Client:
        """Stands for a server in what a template asks of one: variables, and none of its blocks."""

        async def read_variable_by_name(self, name: str) -> Any:
            return type("Variable", (), {"value": PLACES[f"prefect.variables.{name}"]})

    document = filled(name, kind, [*ASKED[kind], "env={}"])
    configuration = asyncio.run(
        worker.job_configuration.from_template_and_values(document, {"env": {"A": "b"}}, client=Client())
    )
    assert configuration.env["ENGINERY_STORE"] == "s3://models/engines"
    assert configuration.env["A"] == "b"
    if kind == "kubernetes":
        validate = importlib.import_module("kubernetes_validate").validate
        configuration._populate_env_in_manifest()
        configuration._populate_command_if_not_present()
        job = json.loads(json.dumps(configuration.job_manifest))
        for word in ("parallelism", "completions"):  # Prefect wants them where Kubernetes has no such field
            assert job["spec"]["template"]["spec"].pop(word) == 1
        for version in ("1.31", "1.37"):
            validate(job, version, strict=True)
        job["spec"]["template"]["spec"]["nodeSelektor"] = {}
        with pytest.raises(sys.modules["kubernetes_validate"].ValidationError):
            validate(job, "1.37", strict=True)
