import json

import typer
from typer.testing import CliRunner

from enginery import pool_commands
from recipes.pools import pools_of
from tasks.toolchain import probe_host
from tests.integration.building import enginery


def run(*arguments, status=0, env=None):
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    pool_commands.register(app)
    done = CliRunner().invoke(app, [*map(str, arguments)], env=env)
    assert done.exit_code == status, (done.stdout, done.stderr, done.exception)
    return done


def test_a_host_is_told_its_pools():
    names = pools_of(probe_host())
    assert run().stdout.split() == list(names)
    assert json.loads(run("--json").stdout) == list(names)


def test_a_template_is_printed_with_what_is_set():
    asked = [
        "gpu-sm89-rtx1.7",
        "--type",
        "kubernetes",
        "--set",
        "image=enginery:1",
        "--set",
        "pod_watch_timeout_seconds=60",
    ]
    document = json.loads(run(*asked, "--no-gpu").stdout)
    defaults = {name: one.get("default") for name, one in document["variables"]["properties"].items()}
    assert (defaults["image"], defaults["pod_watch_timeout_seconds"], defaults["gpus"]) == ("enginery:1", 60, 0)
    assert (
        "pod_watch_timeout_seconds=soon"
        in run(*asked[:-1], "pod_watch_timeout_seconds=soon", "--no-gpu", status=2).stderr
    )
    assert "gpu_product" in run(*asked, status=2).stderr


def test_what_no_build_looks_for_is_no_pool():
    assert "no build looks for" in run("gpu-sm90", status=2).stderr
    assert "PREFECT_API_URL" in run("portable", "--create", status=2, env={"PREFECT_API_URL": ""}).stderr


def test_a_server_that_does_not_answer_is_named_with_what_to_do(tmp_path):
    address = "http://127.0.0.1:9/api"  # the port of the discard service
    done = enginery("pool", "portable", "--create", cwd=tmp_path, env={"PREFECT_API_URL": address})
    assert done.returncode == 1
    assert f"no Prefect server answers at {address} (" in done.stderr
    assert "start it (prefect server start), or mend PREFECT_API_URL" in done.stderr
    assert "Traceback" not in done.stderr
