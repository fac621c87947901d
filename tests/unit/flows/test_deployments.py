"""prefect.yaml against the flows that it names: every entrypoint is a flow that takes the parameters that are set."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import yaml
from prefect import Flow

ROOT = Path(__file__).resolve().parents[3]
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
# What people and other flows ask for by name.
NAMES = {
    "build/recipe",
    "build/folder",
    "compile/target",
    "verify/store",
    "promote/engine",
    "gc/store",
    "watch/host",
    "rebuild/pools",
}


def _flow(deployment: dict) -> Flow:
    module, _, name = deployment["entrypoint"].partition(":")
    return getattr(importlib.import_module(module), name)


def test_every_deployment_is_a_flow_that_takes_its_parameters():
    for deployment in DEPLOYMENTS:
        flow = _flow(deployment)
        assert isinstance(flow, Flow)
        taken = inspect.signature(flow.fn).parameters
        assert set(deployment.get("parameters", {})) <= set(taken)


def test_deployments_have_the_names_that_are_asked_for():
    named = [f"{_flow(deployment).name}/{deployment['name']}" for deployment in DEPLOYMENTS]
    assert len(named) == len(set(named))
    assert set(named) >= NAMES


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda one: one["entrypoint"])
def test_forms_say_what_every_parameter_is(deployment: dict):
    for name, schema in _flow(deployment).parameters.model_dump()["properties"].items():
        assert schema.get("description"), name
        assert schema["title"] != name, name
