import json

import pytest

from artifacts.attestation import Attestation, effective
from artifacts.catalog import EngineCatalog, EngineId
from artifacts.errors import IntegrityError
from artifacts.folder import FolderStore
from artifacts.refs import digest_bytes
from artifacts.resolve import Request, resolve
from tests.engines import digest, make_engine, make_manifest

MEASURED = {
    "executed": True,
    "parity": {"relative_l2": 0.001, "max_abs": 0.01, "cosine": 0.99999, "non_finite": 0},
    "metric": {"name": "top1", "value": 0.98, "source": 0.9889},
}
REQUEST = Request({"tensorrt-rtx": "1.7.1.116"}, ("sm89",), "linux", "x86_64")


def attestation(of, **changes):
    """An execution of a manifest's engine on an L4, with values replaced."""
    document = {
        "schema": 1,
        "engine": str(of.identity),
        "manifest": digest_bytes(of.to_bytes()),
        "created": "2026-02-03T04:05:06Z",
        "key": digest("executed"),
        "host": {"name": "box", "os": "linux", "arch": "x86_64", "driver": "580.1"},
        "device": {"name": "NVIDIA L4", "sm_count": 58},
        "gpu": "sm89",
        "runtime_version": "1.7.1.116",
        "passed": True,
        "reasons": [],
        "measured": MEASURED,
        "enginery": "0.1.0",
    }
    return Attestation.from_bytes(json.dumps(document | changes).encode())


@pytest.fixture
def catalog(tmp_path):
    warnings = []
    made = EngineCatalog(FolderStore(tmp_path / "store"), warnings.append)
    yield made
    assert warnings == []


@pytest.fixture
def manifest(catalog, tmp_path):
    made = make_engine(catalog.store, tmp_path, recipe="digits", target="tensorrt-rtx-1.7.1.116-sm89", build="fp16-a")
    catalog.publish(made)
    return made


def folder(manifest):
    return f"engines/{manifest.identity}/verification"


def test_what_is_written_is_read_back():
    made = attestation(make_manifest())
    assert Attestation.from_bytes(made.to_bytes()) == made
    assert made.name == f"sm89-nvidia-l4-{digest('executed')[:16]}.json"


def test_without_a_gpu_the_name_says_cpu():
    assert attestation(make_manifest(), device=None, gpu="cpu").name.startswith("cpu-")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", "not JSON"),
        (b"[]", "schema None, this release reads 1"),
        (b'{"schema": 2}', "schema 2, this release reads 1"),
        (b'{"schema": true}', "schema True"),
        (b'{"schema": 1}', "engine: Field required"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_attestation_is_refused(data, words):
    with pytest.raises(IntegrityError, match=words):
        Attestation.from_bytes(data)


def test_what_was_measured_later_takes_the_place_of_nothing():
    manifest = make_manifest()
    assert effective(manifest, []) is manifest
    found = effective(manifest, [attestation(manifest)])
    assert not manifest.verification.engine.executed
    assert found.verification.engine.executed
    assert found.verification.engine.metric.value == 0.98
    assert found.verification.passed
    assert found.verification.graph == manifest.verification.graph
    assert found.provenance == manifest.provenance


def test_what_the_builder_measured_stands():
    manifest = make_manifest({"verification.engine": MEASURED | {"metric": None}})
    assert effective(manifest, [attestation(manifest)]) == manifest


def test_one_that_failed_fails_the_engine_whichever_came_later():
    manifest = make_manifest()
    bad = attestation(manifest, passed=False, reasons=["top1 0.5 < floor 0.97"], created="2026-01-01T00:00:00Z")
    for order in ([bad, attestation(manifest)], [attestation(manifest), bad]):
        found = effective(manifest, order)
        assert not found.verification.passed
        assert found.verification.engine == bad.measured
    executed = make_manifest({"verification.engine": MEASURED})
    assert not effective(executed, [bad]).verification.passed


def test_gates_that_failed_do_not_pass_by_what_was_executed_later():
    manifest = make_manifest({"verification.passed": False})
    assert not effective(manifest, [attestation(manifest)]).verification.passed


def test_a_catalog_keeps_it_beside_the_manifest_which_stays_as_it_is(catalog, manifest):
    engine, before = EngineId.of(manifest.identity), catalog.manifest_bytes(EngineId.of(manifest.identity))
    made = attestation(manifest)
    assert catalog.attest(engine, made) == made
    assert catalog.attestations(engine, made.manifest) == [made]
    assert catalog.manifest_bytes(engine) == before
    assert catalog.manifest(engine) == manifest
    assert catalog.effective(engine).verification.engine.executed
    assert [found.verification.engine.executed for found in catalog.manifests()] == [True]
    assert catalog.engines() == [engine]


def test_of_two_about_one_action_the_first_counts(catalog, manifest):
    engine = EngineId.of(manifest.identity)
    first = catalog.attest(engine, attestation(manifest))
    assert catalog.attest(engine, attestation(manifest, created="2026-03-03T04:05:06Z")) == first
    other = attestation(manifest, key=digest("another driver"))
    assert catalog.attest(engine, other) == other
    assert len(catalog.attestations(engine, first.manifest)) == 2


def test_a_damaged_one_is_passed_over_aloud_and_replaced(manifest, catalog):
    warnings = []
    listening = EngineCatalog(catalog.store, warnings.append)
    engine, made = EngineId.of(manifest.identity), attestation(manifest)
    catalog.store.write(f"{folder(manifest)}/{made.name}", b"{")
    assert not listening.effective(engine).verification.engine.executed
    assert len(warnings) == 1
    assert made.name in warnings[0]
    assert listening.attest(engine, made) == made
    assert catalog.effective(engine).verification.engine.executed


def test_one_about_another_manifest_says_nothing_of_this_one(manifest, catalog):
    warnings = []
    listening = EngineCatalog(catalog.store, warnings.append)
    engine = EngineId.of(manifest.identity)
    catalog.attest(engine, attestation(manifest, manifest=digest("an earlier manifest")))
    assert not listening.effective(engine).verification.engine.executed
    assert not listening.manifests("digits")[0].verification.engine.executed
    assert all("is about another manifest" in words for words in warnings)
    assert len(warnings) == 2


def test_hosts_resolve_by_what_was_executed_later(catalog, manifest, tmp_path):
    other = make_engine(catalog.store, tmp_path, recipe="digits", target=manifest.identity.target, build="fp16-b")
    catalog.publish(other)
    assert resolve(catalog.manifests("digits"), REQUEST).best.identity == other.identity
    catalog.attest(EngineId.of(manifest.identity), attestation(manifest))
    assert resolve(catalog.manifests("digits"), REQUEST).best.identity == manifest.identity
    failed = attestation(manifest, passed=False, key=digest("another driver"), reasons=["top1 0.5 < floor 0.97"])
    catalog.attest(EngineId.of(manifest.identity), failed)
    found = resolve(catalog.manifests("digits"), REQUEST)
    assert found.best.identity == other.identity
    assert found.candidates[-1].reasons == ("its gates did not pass",)
