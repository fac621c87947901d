"""Provenance: a statement that in-toto's own readers take, from what the manifest says."""

from __future__ import annotations

import json

from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement

from artifacts.provenance import provenance_name, provenance_of
from tests.engines import make_manifest


def test_in_totos_own_readers_take_it() -> None:
    statement = json_format.Parse(provenance_of(make_manifest()), statement_pb2.Statement())
    Statement.copy_from_pb(statement).validate()
    assert statement.predicate_type == "https://slsa.dev/provenance/v1"
    # Strictly: a field that SLSA does not know is an error here.
    provenance = json_format.Parse(json_format.MessageToJson(statement.predicate), provenance_pb2.Provenance())
    assert provenance.build_definition.build_type == "urn:enginery:build:v1"
    assert provenance.run_details.builder.id == "urn:enginery:host:builder"
    assert all(one.uri or one.digest for one in provenance.build_definition.resolved_dependencies)


def test_it_says_of_what_and_how_the_engine_was_made() -> None:
    manifest = make_manifest({"calibration": {"digest": "ab" * 32, "samples": 256, "method": "entropy"}})
    document = json.loads(provenance_of(manifest, "https://ci.example/runner"))
    assert document["subject"] == [{"name": "model.plan", "digest": {"sha256": manifest.files["model.plan"].digest}}]
    definition = document["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["recipe"] == {
        "name": "digits", "sha256": manifest.provenance.recipe_digest, "text": manifest.provenance.recipe_text,
    }  # fmt: skip
    dependencies = {one["name"]: one for one in definition["resolvedDependencies"]}
    assert dependencies["weights.safetensors"]["digest"]["sha256"] == manifest.provenance.source["weights.safetensors"]
    assert dependencies["git"]["digest"] == {"gitCommit": manifest.provenance.git.commit}
    assert dependencies["calibration"]["digest"] == {"sha256": "ab" * 32}
    assert dependencies["torch"]["uri"] == "pkg:generic/torch@2.13.0%2Bcpu"
    assert "os" not in dependencies
    details = document["predicate"]["runDetails"]
    assert details["builder"]["id"] == "https://ci.example/runner"
    assert details["metadata"] == {
        "invocationId": manifest.provenance.key,
        "startedOn": "2026-01-02T03:03:00Z",
        "finishedOn": manifest.identity.created,
    }


def test_names_differ_by_content() -> None:
    assert provenance_name("ab" * 32) == "provenance-abababababab.intoto.json"
