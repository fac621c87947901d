import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import typer
from typer.testing import CliRunner

from artifacts.catalog import EngineCatalog
from artifacts.folder import FolderStore
from artifacts.host import Gpu
from enginery import catalog_commands, host_commands
from enginery.checkup import _import_failures
from tasks.toolchain import probe_host, version
from tests.engines import manifest_document

ROOT = Path(__file__).parents[3]


def run(*arguments, status=0):
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    catalog_commands.register(app)
    host_commands.register(app)
    done = CliRunner().invoke(app, [*arguments])
    assert done.exit_code == status, (done.stdout, done.stderr, done.exception)
    return done


def test_host_shows_what_is_here():
    host = probe_host()
    shown = run("host").stdout
    assert host.name in shown
    assert all(f"{runtime} {found}" in shown for runtime, found in host.runtimes.items())
    assert json.loads(run("host", "--json").stdout) == json.loads(json.dumps(host.to_json()))


def test_a_gpu_is_shown_with_what_engines_depend_on():
    gpu = Gpu("L4", "GPU-1", "sm89", 24 << 30, 58, 192, 48 << 20, shared_memory_per_sm=102_400, ecc=False)
    assert host_commands.device_text(gpu) == "58 SMs, 192-bit bus, L2 50.3 MB, 102.4 kB of an SM, ECC off"
    assert host_commands.device_text(replace(gpu, mig=True)).endswith("ECC off, a MIG slice")
    assert host_commands.device_text(Gpu("L4", "GPU-1", "sm89", None)) == ""


def test_host_records_its_fingerprint_in_the_store(tmp_path):
    run("host", "--record", "--store", str(tmp_path / "store"))
    host = probe_host()
    assert EngineCatalog(FolderStore(tmp_path / "store")).host(host.name) == host


def test_doctor_finds_this_installation_sound():
    done = run("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["onnxruntime"] == checks["onnxruntime"] | {"ok": True, "core": True, "found": version("onnxruntime")}
    assert checks["tensorrt_rtx"]["core"] is False
    assert all(check["advice"] and check["purpose"] for check in checks.values())


def test_doctor_names_a_core_package_that_is_of_another_version_and_one_that_does_not_import(tmp_path):
    # An environment of our own, before the real one on the path: an Enginery that needs what is not there.
    for name, text in {
        "enginery-9.dist-info": "Requires-Dist: psutil>=900\nRequires-Dist: brokenpkg\nRequires-Dist: absentpkg\n",
        "brokenpkg-1.dist-info": "",
    }.items():
        (tmp_path / name).mkdir()
        distribution, _, rest = name.partition("-")
        (tmp_path / name / "METADATA").write_text(f"Name: {distribution}\nVersion: {rest[0]}\n{text}")
    (tmp_path / "brokenpkg.py").write_text("raise RuntimeError('no such library')\n")
    code = "from enginery.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert done.returncode == 1, done.stderr
    found = {check["name"]: check["found"] for check in json.loads(done.stdout)["checks"] if not check["ok"]}
    assert "but >=900 is needed" in found["psutil"]
    assert "does not import: RuntimeError: no such library" in found["brokenpkg"]
    assert found["absentpkg"] == "not installed"


def test_a_module_that_ends_the_process_is_told_from_those_after_it(tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text("import os; os.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    failures = _import_failures(["json", "deadly", "csv", "no_such_module"])
    assert set(failures) == {"deadly", "csv", "no_such_module"}
    assert "the process ended" in failures["deadly"]
    assert "not tried" in failures["csv"]


@pytest.mark.parametrize("document", ["recipe", "manifest"])
def test_schema_prints_a_schema(document):
    schema = json.loads(run("schema", document).stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    if document == "manifest":
        jsonschema.Draft202012Validator(schema).validate(manifest_document())


def test_schema_of_anything_else_is_a_wrong_command_line():
    assert "recipe" in run("schema", "engine", status=2).stderr
