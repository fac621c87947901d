"""The command on work pools: which ones this host can work for, and a pool's template, filled in and created."""

from __future__ import annotations

import copy
import json
import os
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from enginery.output import FAILED, WRONG, JsonOption, explains_errors, note, print_json, stop

_MOST_SAID: Final = 800  # of an answer that repeats the whole template
_FOLDER: Final = Path(__file__).resolve().parent.parent / "flows" / "pools"
# What a pool has whose jobs get no GPU. Images of TensorRT show every GPU by themselves, unless they are told not to.
_NO_GPU: Final[dict[str, dict[str, Any]]] = {
    "process": {},
    "docker": {"nvidia_visible_devices": "void", "runtime": "runc"},
    "kubernetes": {"gpus": 0, "nvidia_visible_devices": "void", "tolerations": []},
}


class PoolType(str, Enum):
    """What a pool's worker starts for each run."""

    PROCESS = "process"
    DOCKER = "docker"
    KUBERNETES = "kubernetes"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("pool")(pool)


@explains_errors
def pool(
    name: Annotated[str | None, typer.Argument(metavar="[POOL]", help="Its name; default: list this host's.")] = None,
    kind: Annotated[PoolType, typer.Option("--type", help="What a worker starts for each run.")] = PoolType.PROCESS,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="VARIABLE=VALUE", help="Set a variable of the template.")
    ] = None,
    no_gpu: Annotated[
        bool, typer.Option("--no-gpu", help="Its runs get no GPU, as those of `portable` never do.")
    ] = False,
    create: Annotated[
        bool, typer.Option("--create", help="Create it, or renew its template, on the server of PREFECT_API_URL.")
    ] = False,
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", metavar="NAME", help="With --create: make the queue of this host's rebuilds too."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the template of a Prefect work pool, or create the pool; without a name, list the pools that this host can work for.

    TensorRT compiles for the GPUs that are here, TensorRT-RTX for any that it knows. See docs/fleet.md.

    Example: enginery pool gpu-sm90-trt10.16 --type kubernetes --set image=registry.example.com/enginery:0.1.0-trt10.16
    --set gpu_product=NVIDIA-H100-80GB-HBM3 --create
    """
    from recipes.pools import NIGHTLY, host_queue, is_pool_name

    if name is None:
        _list(as_json=as_json)
        return
    if not is_pool_name(name):
        stop(WRONG, f"{name}: no build looks for this pool (names: portable, gpu-sm90-trt10.16, gpu-sm89-rtx1.7)")
    template = filled(name, kind.value, settings or (), no_gpu=no_gpu)
    if not create:
        print_json(template)
        return
    if not os.environ.get("PREFECT_API_URL"):
        stop(WRONG, "--create needs a Prefect server: set PREFECT_API_URL to its address")
    _create(name, kind.value, template, [NIGHTLY, *map(host_queue, hosts or ())])
    if as_json:
        print_json({"pool": name, "type": kind.value})
    from recipes.pools import PORTABLE

    # Two for each GPU, of which one computes; without a limit the first worker takes all that waits (docs/fleet.md).
    limit = "" if name == PORTABLE else " --limit 2"
    note(f"{name}: created or renewed; on its hosts: prefect worker start --pool {name} --type {kind.value}{limit}")


def filled(name: str, kind: str, settings: list[str] | tuple[()], *, no_gpu: bool = False) -> dict[str, Any]:
    """Return a template with these VARIABLE=VALUE as its defaults; ends the command where they do not fit its schema."""
    from jsonschema import Draft202012Validator

    from recipes.pools import PORTABLE

    template: dict[str, Any] = json.loads((_FOLDER / f"{kind}.json").read_text())
    variables = template["variables"]
    known: dict[str, Any] = variables["properties"]
    needs_gpu = not no_gpu and name != PORTABLE
    stated = {} if needs_gpu else copy.deepcopy(_NO_GPU[kind])
    for setting in settings:
        variable, equals, text = setting.partition("=")
        if not equals or variable not in known:
            stop(
                WRONG,
                f"--set {setting}: no such variable of {kind} pools (VARIABLE=VALUE; there are {', '.join(known)})",
            )
        stated[variable] = _value(known[variable], text)
    required = [one for one in variables.get("required", ()) if needs_gpu or one != "gpu_product"]
    if missing := [one for one in required if one not in stated]:
        told = "; ".join(f"--set {one}=...: {known[one]['description']}" for one in missing)
        stop(WRONG, f"{name} of type {kind} needs {told}")
    for variable, value in stated.items():
        for _fault in Draft202012Validator(known[variable]).iter_errors(value):
            stop(WRONG, f"--set {variable}={value}: does not fit ({known[variable]['description']})")
        known[variable]["default"] = value
    variables["required"] = required
    return template


def _value(schema: dict[str, Any], text: str) -> Any:
    """Read a value as its variable's schema wants it: text as it is, everything else as JSON."""
    types = {one.get("type") for one in (schema, *schema.get("anyOf", ()))}
    if "string" in types:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _list(*, as_json: bool) -> None:
    from enginery.rows import say
    from recipes.pools import pools_of
    from tasks.toolchain import probe_host

    names = pools_of(probe_host())
    if as_json:
        print_json(list(names))
        return
    for one in names:
        say(one)


def _create(name: str, kind: str, template: dict[str, Any], queues: list[str]) -> None:
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectAlreadyExists

    try:
        with get_client(sync_client=True) as client:
            try:
                client.create_work_pool(WorkPoolCreate(name=name, type=kind, base_job_template=template))
            except ObjectAlreadyExists:
                there = client.read_work_pool(name)
                if there.type != kind:
                    stop(WRONG, f"{name} is a pool of type {there.type} (prefect work-pool delete {name}, or --type)")
                # The template alone: Prefect's own overwriting forgets the pool's concurrency limit.
                client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))
            # A worker that is told to take a queue which is not there takes nothing at all.
            for queue in queues:
                with suppress(ObjectAlreadyExists):
                    client.create_work_queue(queue, work_pool_name=name)
    except httpx.TransportError as err:
        advice = "start it (prefect server start), or mend PREFECT_API_URL"
        stop(FAILED, f"no Prefect server answers at {os.environ['PREFECT_API_URL']} ({err}): {advice}")
    except httpx.HTTPError as err:
        stop(FAILED, f"{os.environ['PREFECT_API_URL']}: {str(err)[:_MOST_SAID]}")
