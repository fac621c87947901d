"""Action records: they come back as they were written, and anything else is an IntegrityError."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from artifacts.errors import IntegrityError
from artifacts.keys import Action
from artifacts.records import ActionRecord
from artifacts.refs import ArtifactRef, digest_bytes
from tests.unit.artifacts.test_keys import objects, values

refs = st.builds(lambda data: ArtifactRef(digest_bytes(data), len(data), "application/onnx"), st.binary(max_size=8))
file_names = st.sampled_from(["model.onnx", "model.onnx.data", "é.bin", "sub/0.npy"])
records = st.builds(
    ActionRecord,
    preimage=st.builds(
        lambda params, tools: Action("export", 1, params=params, toolchain=tools).preimage(), objects, objects
    ),
    outputs=st.dictionaries(file_names, refs),
    facts=objects,
    seconds=st.integers(0, 10**9).map(lambda ticks: round(ticks / 10_000, 4)),
    started=st.just("2026-01-01T00:00:00Z"),
    producer=objects,
)

EXAMPLE = ActionRecord(
    Action("export", 1, {"opset": 18}).preimage(),
    {"model.onnx": ArtifactRef("a" * 64, 5, "application/onnx")},
    {"nodes": 3},
    1.25,
    "2026-01-01T00:00:00Z",
    {"host": "h"},
)


@settings(max_examples=40)
@given(records)
def test_round_trip(record: ActionRecord) -> None:
    data = record.to_bytes()
    back = ActionRecord.from_bytes(data)
    assert back == record
    assert back.key == record.key
    assert back.to_bytes() == data


def test_key_and_stage_come_from_the_preimage() -> None:
    action = Action("export", 3, {"opset": 18})
    record = ActionRecord(action.preimage(), {})
    assert (record.stage, record.key) == ("export", action.key)
    assert json.loads(record.to_bytes())["key"] == action.key


@given(st.binary(max_size=60))
def test_garbage_bytes(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        ActionRecord.from_bytes(data)


@given(values)
def test_other_json(value: Any) -> None:
    with pytest.raises(IntegrityError):
        ActionRecord.from_bytes(json.dumps(value).encode())


@settings(max_examples=40)
@given(records, st.data())
def test_damaged_bytes_are_noticed_or_harmless(record: ActionRecord, data: st.DataObject) -> None:
    text = bytearray(record.to_bytes())
    place = data.draw(st.integers(0, len(text) - 1))
    text[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        back = ActionRecord.from_bytes(bytes(text))
    except IntegrityError:
        return
    assert back.key == record.key  # what was asked is covered by the key; the rest may be read wrong


@settings(max_examples=40)
@given(records, st.integers(0, 10_000))
def test_cut_bytes(record: ActionRecord, length: int) -> None:
    text = record.to_bytes().rstrip()
    with pytest.raises(IntegrityError):
        ActionRecord.from_bytes(text[: min(length, len(text) - 1)])


@given(st.sampled_from(["schema", "key", "preimage", "outputs", "facts", "seconds", "started", "producer"]), values)
@example("seconds", "INF")
def test_a_field_that_is_wrong_or_gone(name: str, value: Any) -> None:
    document = json.loads(EXAMPLE.to_bytes())
    del document[name]
    with pytest.raises(IntegrityError):
        ActionRecord.from_bytes(json.dumps(document).encode())
    document[name] = value
    try:
        back = ActionRecord.from_bytes(json.dumps(document).encode())
    except IntegrityError:
        return
    assert (back.stage, back.key) == (EXAMPLE.stage, EXAMPLE.key)
    back.to_bytes()


def changed(**fields: Any) -> bytes:
    return json.dumps({**json.loads(EXAMPLE.to_bytes()), **fields}).encode()


REF = {"digest": "a" * 64, "size": 5, "media_type": "x"}
WITHOUT_STAGE = {"x": 1}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'{"schema": 1' + b', "a": ' + b'{"b":' * 5000 + b"1" + b"}" * 5001, "not JSON|incomplete"),
        (b"[]", "schema 'list', expected 1"),
        (changed(schema=2), "schema 2, expected 1"),
        (changed(schema=None), "schema None"),
        (changed(key="b" * 64), "states key bbbbbbbbbbbb but its preimage hashes to"),
        (changed(key=None), "states key None"),
        (changed(preimage={**EXAMPLE.preimage, "stage": "type"}), "its preimage hashes to"),
        (changed(preimage=WITHOUT_STAGE, key=ActionRecord(WITHOUT_STAGE, {}).key), "incomplete.*stage"),
        (changed(preimage={"stage": 1}, key=ActionRecord({"stage": 1}, {}).key), "incomplete.*stage is 1"),
        (changed(preimage=[]), "incomplete"),
        (changed(outputs={"../../etc/passwd": REF}), "is not a file name"),
        (changed(outputs={"/etc/passwd": REF}), "is not a file name"),
        (changed(outputs={"": REF}), "is not a file name"),
        (changed(outputs={"a": {**REF, "size": -1}}), "size must be"),
        (changed(outputs={"a": "x"}), "not an artifact reference"),
        (changed(outputs=[]), "incomplete"),
        (changed(facts=[1]), "expected an object, got list"),
        (changed(facts={"loss": float("nan")}), "not JSON: .*nan"),
        (changed(facts={"x": 0}).replace(b'"x": 0', b'"x": 1e999'), "not JSON: .*inf"),
        (changed(facts={"x": "\ud800"}), "not JSON"),
        (changed(seconds="soon"), "incomplete"),
        (changed(seconds=None), "incomplete"),
        (changed(seconds=10**400), "incomplete"),
    ],
)
def test_what_is_said_of_damage(data: bytes, said: str) -> None:
    with pytest.raises(IntegrityError, match=said):
        ActionRecord.from_bytes(data)


def test_facts_that_are_not_json_are_not_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        ActionRecord(EXAMPLE.preimage, {}, facts={"loss": float("nan")}).to_bytes()


def test_a_flipped_bit_is_never_another_record() -> None:
    text = EXAMPLE.to_bytes()
    refused = 0
    for bit in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            assert ActionRecord.from_bytes(bytes(flipped)) == EXAMPLE
        except IntegrityError:
            refused += 1
    assert refused > 6 * len(text)


def test_a_record_of_an_earlier_release_has_no_check() -> None:
    document = json.loads(EXAMPLE.to_bytes())
    del document["check"]
    assert ActionRecord.from_bytes(json.dumps(document).encode()) == EXAMPLE
