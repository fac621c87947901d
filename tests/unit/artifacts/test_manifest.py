import json
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from artifacts.errors import IntegrityError
from artifacts.manifest import FallbackFacts, Manifest, ProviderFacts, manifest_schema
from artifacts.manifest_gates import Measured
from tests.engines import GOLDEN, make_manifest, manifest_document

PUBLISHED_SCHEMA = Path(__file__).parents[3] / "docs" / "manifest-v1.schema.json"


def read(document):
    return Manifest.from_bytes(json.dumps(document).encode())


def test_the_golden_manifest_stays_readable_and_is_written_back_byte_for_byte():
    data = GOLDEN.read_bytes()
    manifest = Manifest.from_bytes(data)
    assert str(manifest.identity) == f"digits/tensorrt-rtx-1.7.1.116-sm89/{manifest.identity.build}"
    assert manifest.precision.tried[0].reasons == ("top1 0.95 < floor 0.97",)
    assert manifest.profiles[1].inputs["image"].max == (256, 1, 8, 8)
    assert manifest.size == 4
    assert manifest.to_bytes() == data


def test_the_published_schema_is_the_models():
    assert json.loads(PUBLISHED_SCHEMA.read_bytes()) == manifest_schema(), (
        "run: enginery schema manifest > docs/manifest-v1.schema.json"
    )


def test_the_published_schema_accepts_the_golden_manifest_and_refuses_a_wrong_one():
    validator = jsonschema.Draft202012Validator(json.loads(PUBLISHED_SCHEMA.read_bytes()))
    validator.validate(manifest_document())
    for changes in ({"schema": 4}, {"files": {"x": {}}}, {"identity.build": "../x"}):
        assert not validator.is_valid(manifest_document(changes))
    without_version = manifest_document()
    del without_version["schema"]
    assert not validator.is_valid(without_version)


def test_keys_that_a_later_release_adds_within_the_version_are_ignored():
    document = manifest_document()
    document["energy"] = {"joules": 0.4}
    document["identity"]["nickname"] = "fast"
    document["verification"]["engine"]["latency"] = 1
    assert read(document) == make_manifest()


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (4, "newer Enginery"),
        (0, "not a manifest"),
        ("1", "not a manifest"),
        (True, "not a manifest"),
        (1.0, "not a manifest"),
    ],
)
def test_another_version_is_refused_before_anything_else_is_looked_at(version, words):
    with pytest.raises(IntegrityError, match=words):
        read({"schema": version})


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("identity.recipe", "../digits", "identity.recipe"),
        ("identity.build", "", "identity.build"),
        ("identity.created", "yesterday", "identity.created"),
        ("identity.created", "2026-01-02T03:04:05+01:00", "identity.created"),
        ("compatibility.gpus", [], "compatibility.gpus"),
        ("compatibility.os", 7, "compatibility.os"),
        ("compatibility.plugins", ["plugin-0.so"], "plugin-0.so' is not among the files"),
        ("compatibility.plugins", ["../plugin.so"], "compatibility.plugins"),
        ("plan", "other.plan", "not among the files"),
        ("files", {}, "not among the files"),
        ("files", {"../model.plan": {"digest": "0" * 64, "size": 1, "media_type": "x"}}, "cannot be the name"),
        ("files", {"manifest.json": {"digest": "0" * 64, "size": 1, "media_type": "x"}}, "cannot be the name"),
        ("files", {"model.plan": {"digest": "0" * 63, "size": 1, "media_type": "x"}}, "digest"),
        ("files", {"model.plan": {"digest": "0" * 64, "size": -1, "media_type": "x"}}, "size"),
        ("verification.engine", {"executed": True}, "without a measure"),
        ("verification.engine", {"executed": False}, "without a reason"),
        ("verification.passed", "yes", "verification.passed"),
        ("provenance.key", "abc", "provenance.key"),
    ],
)
def test_what_is_wrong_is_named(path, value, words):
    with pytest.raises(IntegrityError, match=words):
        read(manifest_document({path: value}))


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b"[" * 100_000, b'{"schema": NaN}', b'{"schema": 1}'],
)
def test_bytes_that_are_no_manifest_are_an_integrity_error(data):
    with pytest.raises(IntegrityError, match="manifest"):
        Manifest.from_bytes(data)


def test_numbers_that_json_does_not_have_are_refused():
    text = GOLDEN.read_text().replace("0.000412", "NaN", 1)
    with pytest.raises(IntegrityError, match="NaN"):
        Manifest.from_bytes(text.encode())


def test_every_part_is_demanded():
    for name in manifest_document():
        document = manifest_document()
        del document[name]
        with pytest.raises(IntegrityError, match="schema" if name == "schema" else name):
            read(document)


def test_a_manifest_does_not_change():
    manifest = make_manifest()
    with pytest.raises(ValidationError, match="frozen"):
        manifest.plan = "other"


def test_a_manifest_cannot_claim_an_execution_that_measured_nothing():
    with pytest.raises(ValidationError, match="without a measure"):
        Measured(executed=True)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), st.lists, max_leaves=3), st.data())
def test_whatever_stands_in_place_of_a_value_reading_ends_in_a_manifest_or_an_integrity_error(value, data):
    document = manifest_document()
    part, names = document, []
    while isinstance(part, dict) and part:
        names.append(data.draw(st.sampled_from(sorted(part))))
        part = part[names[-1]]
    target = document
    for name in names[:-1]:
        target = target[name]
    target[names[-1]] = value
    try:
        manifest = read(document)
    except IntegrityError:
        return
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


FALLBACK = {
    "kind": "onnx",
    "instead_of": ["tensorrt-rtx:sm89"],
    "providers": {"": [{"name": "CPUExecutionProvider", "options": {}}]},
}


def test_a_fallback_is_of_version_3_alone_so_that_no_earlier_reader_takes_it_for_an_engine():
    manifest = read(manifest_document({"schema": 3, "fallback": FALLBACK}))
    assert manifest.fallback is not None
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    for changes in ({"schema": 1, "fallback": FALLBACK}, {"schema": 3}):
        with pytest.raises(IntegrityError, match="schema"):
            read(manifest_document(changes))


def test_a_part_of_a_fallback_has_its_own_providers_alone():
    facts = FallbackFacts(kind="onnx", instead_of=(), providers={"a": (), "b": (ProviderFacts(name="X", options={}),)})
    assert [one.name for one in facts.of_part("b").providers[""]] == ["X"]
