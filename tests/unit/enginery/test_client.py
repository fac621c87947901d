import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from artifacts.catalog import EngineCatalog, EngineId
from artifacts.errors import IntegrityError, NotFoundError, StoreError
from artifacts.folder import FolderStore
from artifacts.resolve import Request
from artifacts.store import open_store
from enginery import client
from tests.engines import make_engine

REQUEST = Request({"tensorrt-rtx": "1.7.1.116"}, ("sm89",), "linux", "x86_64")


def publish(store, folder, **names):
    names = {"recipe": "digits", "target": "tensorrt-rtx-1.7.1.116-sm89", "build": "fp16-a"} | names
    manifest = make_engine(store, folder, b"plan of " + names["build"].encode(), **names)
    EngineCatalog(store).publish(manifest)
    return manifest


@pytest.fixture
def store(tmp_path):
    return FolderStore(tmp_path / "store")


@pytest.fixture
def manifest(store, tmp_path):
    return publish(store, tmp_path)


@pytest.fixture
def to(tmp_path):
    return tmp_path / "pulled"


def test_serving_code_loads_no_framework_and_no_prefect():
    code = (
        "import sys, enginery.client\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} & {'prefect', 'torch', 'onnx', 'onnxruntime', "
        "'numpy', 'tensorrt_rtx', 'boto3', 'yaml', 'typer', 'rich', 'sqlalchemy', 'fastapi'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""


def test_what_is_resolved_is_pulled_whole(store, manifest, to):
    chosen = client.resolve(store, "digits", REQUEST).best
    pulled = client.pull(store, chosen, to)
    assert pulled.folder == to / str(manifest.identity)
    assert pulled.plan.read_bytes() == b"plan of fp16-a"
    assert pulled.manifest == manifest
    assert (pulled.folder / "manifest.json").read_bytes() == manifest.to_bytes()
    assert sorted(path.name for path in pulled.folder.iterdir()) == ["manifest.json", "model.plan"]


def test_by_default_this_host_asks(store, manifest):
    resolution = client.resolve(store, "digits")
    assert [str(candidate.manifest.identity) for candidate in resolution.candidates] == [str(manifest.identity)]


def test_a_channel_is_read_from_the_store(store, tmp_path, manifest):
    publish(store, tmp_path, build="fp16-b")
    target = manifest.identity.target
    store.write(f"channels/digits/{target}/production.json", b'{"schema": 1, "build": "fp16-a"}')
    asked = Request(REQUEST.runtimes, REQUEST.gpus, REQUEST.os, REQUEST.arch, channel="production")
    assert client.resolve(store, "digits", asked).best == manifest


def test_an_engine_that_is_there_is_not_fetched_again(store, manifest, to):
    first = client.pull(store, manifest, to)
    inode = first.plan.stat().st_ino
    store.delete(f"engines/{manifest.identity}/model.plan")
    assert client.pull(store, EngineId.of(manifest.identity), to).plan.stat().st_ino == inode


@pytest.mark.parametrize("harm", ["changed", "cut", "gone", "manifest changed", "a folder"])
def test_local_damage_is_found_and_mended(store, manifest, to, harm):
    pulled = client.pull(store, manifest, to)
    victim = pulled.folder / "manifest.json" if harm == "manifest changed" else pulled.plan
    data = victim.read_bytes()
    # Replaced, since the file may be a link to the store's own.
    victim.unlink()
    if harm == "a folder":
        victim.mkdir()
    elif harm != "gone":
        victim.write_bytes(data[:-1] if harm == "cut" else data[:-1] + b"!")
    assert client.pull(store, manifest, to).plan.read_bytes() == b"plan of fp16-a"
    assert (pulled.folder / "manifest.json").read_bytes() == manifest.to_bytes()


def test_damaged_bytes_are_never_handed_out(store, manifest, to):
    path = f"engines/{manifest.identity}/model.plan"
    store.write(path, b"PLAN of fp16-a")
    with pytest.raises(IntegrityError, match="SHA-256"):
        client.pull(store, manifest, to)
    assert not (to / str(manifest.identity)).exists()
    assert [path for path in to.rglob("*") if path.name == "model.plan"] == []


def test_an_engine_that_is_not_published_is_not_pulled(store, manifest, to):
    store.delete(f"engines/{manifest.identity}/manifest.json")
    with pytest.raises(NotFoundError):
        client.pull(store, manifest, to)


def test_a_folder_that_cannot_be_written_is_named(store, manifest, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="give another folder"):
        client.pull(store, manifest, tmp_path / "file")


def test_files_of_the_user_in_the_same_folder_stay(store, manifest, to):
    to.mkdir()
    # `poetry.lock` looks like the guard of a name that a dead process held.
    kept = [to / name for name in ("poetry.lock", "poetry", "notes.txt")]
    for path in kept:
        path.write_text("mine")
    client.pull(store, manifest, to)
    assert all(path.read_text() == "mine" for path in kept)


def _pull(root, engine, to, barrier):
    barrier.wait()
    pulled = client.pull(FolderStore(root), engine, to)
    assert pulled.plan.read_bytes() == b"plan of fp16-a"


def test_many_processes_pull_one_engine_into_one_folder(store, manifest, to):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    engine = EngineId.of(manifest.identity)
    workers = [context.Process(target=_pull, args=(store.root, engine, to, barrier)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    left = [path.name for path in (to / ".pulling").iterdir()]
    assert left == ["pull"]


def _die_pulling(root, engine, to):
    def die(event, arguments):
        if event == "os.rename" and str(engine) in str(arguments):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    client.pull(FolderStore(root), engine, to)


def test_killed_before_the_engine_gets_its_name_nothing_is_there_and_the_next_pull_cleans_up(store, manifest, to):
    engine = EngineId.of(manifest.identity)
    worker = multiprocessing.get_context("fork").Process(target=_die_pulling, args=(store.root, engine, to))
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    assert not (to / str(engine)).exists()
    assert len(list((to / ".pulling").iterdir())) > 1
    assert client.pull(store, engine, to).plan.exists()
    assert [path.name for path in (to / ".pulling").iterdir()] == ["pull"]


def test_from_s3(s3_store_uri, tmp_path, to):
    store = open_store(s3_store_uri)
    manifest = publish(store, tmp_path)
    chosen = client.resolve(store, "digits", REQUEST).best
    assert chosen == manifest
    assert client.pull(store, chosen, to).plan.read_bytes() == b"plan of fp16-a"
