import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from artifacts.catalog import EngineCatalog
from artifacts.folder import FolderStore
from artifacts.host import Gpu, Host
from enginery import catalog_commands, host_commands
from enginery.catalog_tables import age_text
from tests.engines import digest, make_engine

SM89, SM80 = "tensorrt-rtx-1.7.1.116-sm89", "tensorrt-rtx-1.7.1.116-sm80"
ASK = ("--gpu", "sm89", "--runtime", "tensorrt-rtx==1.7.1.116", "--os", "linux", "--arch", "x86_64")


def application():
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    catalog_commands.register(app)
    host_commands.register(app)
    return app


@pytest.fixture
def store(tmp_path):
    return FolderStore(tmp_path / "store")


@pytest.fixture
def run(store):
    def run(*arguments, status=0):
        done = CliRunner().invoke(application(), [*arguments], env={"ENGINERY_STORE": str(store.root)})
        assert done.exit_code == status, (done.stdout, done.stderr, done.exception)
        return done

    return run


@pytest.fixture
def engines(store, tmp_path):
    made = []
    for recipe, target, build in (
        ("digits", SM89, "fp16-aaaaaaaaaaaaaaaa"),
        ("digits", SM89, "int8-bbbbbbbbbbbbbbbb"),
        ("swin", SM89, "fp16-cccccccccccccccc"),
    ):
        manifest = make_engine(store, tmp_path, build.encode(), recipe=recipe, target=target, build=build)
        EngineCatalog(store).publish(manifest)
        made.append(manifest)
    return made


def test_an_empty_store_says_how_to_fill_it(run):
    done = run("list")
    assert done.stdout == ""
    assert "enginery build RECIPE" in done.stderr
    assert json.loads(run("list", "--json").stdout) == []


def test_list_shows_every_engine_or_one_recipes(run, engines):
    lines = run("list").stdout.splitlines()
    assert len(lines) == 4
    assert all(str(manifest.identity) in "".join(lines) for manifest in engines)
    assert "fp16 (asked int8)" in lines[1]
    assert "0.9888" in lines[1]
    listed = json.loads(run("list", "swin", "--json").stdout)
    assert [engine["engine"] for engine in listed] == [str(engines[2].identity)]
    assert listed[0]["metric"]["source"] == 0.9889


def test_in_a_pipe_a_table_is_plain_text(run, engines):
    done = run("list")
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout


def test_a_mistyped_recipe_gets_the_near_one(run, engines):
    assert "did you mean digits?" in run("list", "digit").stderr
    done = run("resolve", "digit", *ASK, status=1)
    assert "did you mean digits?" in done.stderr


def test_a_damaged_engine_is_passed_over_aloud(run, store, engines):
    store.write(f"engines/{engines[0].identity}/manifest.json", b"{")
    done = run("list")
    assert str(engines[0].identity) not in done.stdout
    assert "warning:" in done.stderr
    assert str(engines[0].identity) in done.stderr


def test_show_takes_any_unique_part(run, engines):
    shown = run("show", "fp16-aa").stdout
    for expected in (
        str(engines[0].identity), "tensorrt-rtx 1.7.1.116, sm89", "[1, 1, 8, 8] .. [64, 1, 8, 8] .. [256, 1, 8, 8]",
        "int8: top1 0.95 < floor 0.97", "not executed: tensorrt-rtx engines for sm89 do not run on this host",
        "0123456789abcdef0123456789abcdef01234567", "torch 2.13.0+cpu", "reused",
    ):  # fmt: skip
        assert expected in shown
    assert json.loads(run("show", str(engines[1].identity), "--json").stdout) == engines[1].to_json()


def test_show_says_what_else_could_be_meant(run, engines):
    done = run("show", "digits", status=2)
    assert all(str(manifest.identity) in done.stderr for manifest in engines[:2])
    done = run("show", "digits/tensorrt-rtx-1.7.1.116-sm98", status=1)
    assert f"did you mean digits/{SM89}" in done.stderr


def test_text_that_looks_like_markup_is_shown_as_it_is(run, store, tmp_path):
    manifest = make_engine(store, tmp_path, recipe="x", target="t", build="b")
    tried = manifest.precision.tried[0].model_copy(update={"reasons": ("[red]no[/red]",)})
    odd = manifest.model_copy(update={"precision": manifest.precision.model_copy(update={"tried": (tried,)})})
    EngineCatalog(store).publish(odd)
    assert "[red]no[/red]" in run("show", "x/t/b").stdout


def test_resolve_prints_the_best_engine_alone_on_stdout(run, engines):
    done = run("resolve", "swin", *ASK, "--shape", "image=256x1x8x8")
    assert done.stdout == f"{engines[2].identity}\n"
    assert "best" in done.stderr
    document = json.loads(run("resolve", "swin", *ASK, "--json").stdout)
    assert document["best"]["engine"] == str(engines[2].identity)
    assert document["request"]["gpus"] == ["sm89"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (("--gpu", "sm80"), "is for sm89; there is sm80"),
        (("--runtime", "tensorrt-rtx==1.7.1.117"), "needs tensorrt-rtx 1.7.1.116; there is 1.7.1.117"),
        (("--shape", "image=9x1x16x16"), "no profile covers image=9x1x16x16"),
        (("--channel", "production"), "channel production names nothing for this target"),
        (("--precision", "bf16"), "is fp16, not bf16"),
        (("--os", "windows"), "is for linux x86_64; there is windows x86_64"),
        (("--arch", "aarch64"), "is for linux x86_64; there is linux aarch64"),
    ],
)
def test_where_none_fits_every_candidate_has_its_reason_and_the_status_is_1(run, engines, changes, reason):
    done = run("resolve", "digits", *ASK, *changes, status=1)
    assert done.stdout == ""
    assert done.stderr.count(reason) == 2
    document = json.loads(run("resolve", "digits", *ASK, *changes, "--json", status=1).stdout)
    assert document["best"] is None
    assert [candidate["reasons"] for candidate in document["candidates"]] == [[reason]] * 2 or "profile" in reason


def test_by_default_this_host_asks_and_a_recorded_one_can(run, store, engines):
    json.loads(run("resolve", "digits", "--json", status=1).stdout)
    box = Host("box", "linux", "x86_64", gpus=(Gpu("L4", "GPU-1", "sm89", 1),), runtimes={"tensorrt-rtx": "1.7.1.116"})
    EngineCatalog(store).record_host(box)
    assert run("resolve", "swin", "--host", "box").stdout == f"{engines[2].identity}\n"
    assert "enginery host --record" in run("resolve", "swin", "--host", "bax", status=1).stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu", "sm89"), "both --gpu and --runtime are needed"),
        (("--runtime", "tensorrt-rtx==1"), "both --gpu and --runtime are needed"),
        (("--arch", "x86_64"), "both --gpu and --runtime are needed"),
        (("--host", "auto", "--gpu", "sm89"), "not both"),
        (("--gpu", "8.9", "--runtime", "tensorrt-rtx==1"), "did you mean sm89?"),
        (("--gpu", "L4", "--runtime", "tensorrt-rtx==1"), "write sm89, or cpu"),
        (("--gpu", "sm89", "--runtime", "tensorrt-rtx"), "is not NAME==VERSION"),
        (("--gpu", "sm89", "--runtime", "tensorrt_rtx==1"), "is not NAME==VERSION"),
        (("--gpu", "sm89", "--runtime", "trt==1"), "allowed: tensorrt-rtx"),
        (("--shape", "image"), "is not INPUT=SIZES"),
        (("--shape", "image=1,2"), "is not INPUT=SIZES"),
    ],
)
def test_a_wrong_command_line_is_explained_with_status_2(run, arguments, words):
    done = run("resolve", "digits", *arguments, status=2)
    assert words in " ".join(done.stderr.replace("│", " ").split())


def test_pull_prints_the_path_of_the_checked_plan(run, engines, tmp_path):
    to = tmp_path / "pulled"
    plan = run("pull", "swin", *ASK, "--to", str(to)).stdout.strip()
    assert plan == str(to / str(engines[2].identity) / "model.plan")
    document = json.loads(run("pull", "swin", *ASK, "--to", str(to), "--json").stdout)
    assert document["plan"] == plan
    assert Path(plan).read_bytes() == b"fp16-cccccccccccccccc"
    assert document["files"]["model.plan"]["digest"] == digest("fp16-cccccccccccccccc")


def test_pull_of_damaged_bytes_fails_and_leaves_nothing(run, store, engines, tmp_path):
    store.write(f"engines/{engines[2].identity}/model.plan", b"FP16-cccccccccccccccc")
    done = run("pull", "swin", *ASK, "--to", str(tmp_path / "pulled"), status=1)
    assert done.stdout == ""
    assert "SHA-256" in done.stderr
    assert not (tmp_path / "pulled" / str(engines[2].identity)).exists()


def test_pull_where_none_fits_says_why(run, engines, tmp_path):
    arguments = ("pull", "swin", *ASK, "--gpu", "sm80", "--to", str(tmp_path / "pulled"))
    assert "is for sm89; there is sm80" in run(*arguments, status=1).stderr
    assert json.loads(run(*arguments, "--json", status=1).stdout)["best"] is None


def test_every_command_teaches_by_an_example(run):
    for command in ("list", "show", "resolve", "pull", "host", "doctor", "schema"):
        assert f"Example: enginery {command}" in run(command, "--help").stdout


def test_help_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from enginery import catalog_commands, host_commands\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} & {'prefect', 'torch', 'onnx', 'pydantic', "
        "'numpy', 'boto3', 'yaml', 'packaging'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**os.environ})
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("then", "words"),
    [
        ("2026-01-02T03:04:05Z", "just now"),
        ("2026-01-02T03:00:00Z", "4 min ago"),
        ("2026-01-02T00:04:05Z", "3 h ago"),
        ("2025-12-31T03:04:05.25Z", "2 d ago"),
        ("2026-01-03T00:00:00Z", "in the future"),
    ],
)
def test_ages_are_said_as_people_say_them(then, words):
    import datetime as dt

    now = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.timezone.utc)
    assert age_text(then, now) == words
