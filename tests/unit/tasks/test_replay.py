"""What tells one engine from another: the table of tactics, and the listing of layers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.engines.trt_replay import (
    layer_row,
    pin_tactics,
    replay_flags,
    require_same_layers,
    require_same_tactics,
    tactic_table,
)
from tasks.errors import BackendError


class Value:
    def __init__(self, tactic):
        self.tacticHash, self.timingMSec = tactic, 0.5


class Cache:
    """An editable timing cache of TensorRT 10.8 and later, whose own needs a GPU: what `trt_replay` calls of one."""

    def __init__(self, table):
        self.table, self.updated = table, []

    def queryKeys(self):  # noqa: N802 - TensorRT's name
        return list(self.table)

    def query(self, key):
        return Value(self.table[key])

    def update(self, key, value):
        self.updated.append((key, value.tacticHash))
        return self.table[key] != 666


tables = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(-(1 << 63), (1 << 64) - 1), max_size=5)


@given(tables, tables)
def test_tables_are_the_same_only_if_keys_and_tactics_are(one, other):
    before, after = tactic_table(Cache(one)), tactic_table(Cache(other))
    # Hashes are 64 bits, whether the bindings give them with a sign or without.
    same = {key: value % (1 << 64) for key, value in one.items()} == {k: v % (1 << 64) for k, v in other.items()}
    if same:
        require_same_tactics(before, after)
    else:
        with pytest.raises(BackendError) as caught:
            require_same_tactics(before, after)
        assert caught.value.kind == "not reproducible"
        differing = {key for key in {*before, *after} if before.get(key) != after.get(key)}
        assert any(f"{key}: " in caught.value.message for key in differing)


def test_a_changed_table_is_shown():
    before = {"a": 1, "b": 2, "c": 3}
    with pytest.raises(BackendError) as caught:
        require_same_tactics(
            tactic_table(Cache(before)), tactic_table(Cache({"a": 1, "b": 0x21904DD9D0CD407E, "d": 4}))
        )
    lines = [line.strip() for line in caught.value.message.splitlines()[1:]]
    assert lines == ["b: 0x2 -> 0x21904dd9d0cd407e", "d: + 0x4", "c: - 0x3"]


def test_every_entry_of_a_pinned_cache_is_made_the_one_that_is_taken():
    cache = Cache({"a": 1, "b": 2})
    assert pin_tactics(cache) == {"a": "0x1", "b": "0x2"}
    assert cache.updated == [("a", 1), ("b", 2)]
    with pytest.raises(BackendError, match="does not take its own timing cache entry bad"):
        pin_tactics(Cache({"bad": 666}))


def test_versions_without_an_editable_cache_get_no_flags():
    class Old:
        class BuilderFlag:
            TF32 = 0

        class ITimingCache:
            pass

    assert replay_flags(Old, pinned=True) == ()


def layer(name="conv", tactic="sm90_xmma", value="0x21904dd9d0cd407e", kind="CaskConvolution", form="Half NHWC"):
    tensor = [{"Name": "x", "Dimensions": [1, 3], "Format/Datatype": form}]
    return {
        "Name": name, "LayerType": kind, "Inputs": tensor, "Outputs": tensor, "TacticName": tactic, "TacticValue": value,
        "Weights": {"Type": "Half", "Count": 9}, "Metadata": "",
    }  # fmt: skip


FIRST = {"Layers": [layer("one"), layer("two"), "Reformat"], "Bindings": ["x"]}


def compared(found, tmp_path, expected=FIRST):
    path = tmp_path / "expected-layers.json"
    path.write_text(json.dumps(expected) if not isinstance(expected, str) else expected)
    require_same_layers(path, found)


def test_a_listing_that_is_repeated_passes(tmp_path):
    compared(FIRST, tmp_path)
    # Where the builder put something in memory is no difference: 8.6 prints it in names.
    compared({"Layers": [layer("node 0x7f3a12345678")]}, tmp_path, {"Layers": [layer("node 0x55d0abcdef01")]})


@pytest.mark.parametrize(
    "other",
    [
        layer("two", tactic="sm80_xmma"),
        layer("two", value="0x21904dd9d0cd407f"),
        layer("two", kind="CaskGemm"),
        layer("two", form="Half NCHW"),
        layer("three"),
    ],
)
def test_another_layer_tactic_or_format_is_shown(tmp_path, other):
    with pytest.raises(BackendError) as caught:
        compared({"Layers": [layer("one"), other, "Reformat"]}, tmp_path)
    assert caught.value.kind == "not reproducible"
    lines = [line.strip() for line in caught.value.message.splitlines()[1:]]
    assert lines == [f"-{layer_row(layer('two'))}", f"+{layer_row(other)}"]


def test_layers_in_another_order_or_number_are_a_difference(tmp_path):
    for layers in (FIRST["Layers"][::-1], FIRST["Layers"][:2], [*FIRST["Layers"], "more"], []):
        with pytest.raises(BackendError, match="other layers than the pinned listing"):
            compared({"Layers": layers}, tmp_path)


def test_of_many_differences_some_are_shown_and_all_are_counted(tmp_path):
    with pytest.raises(BackendError, match=r"\(and 192 more\)"):
        compared({"Layers": []}, tmp_path, {"Layers": [layer(str(index)) for index in range(200)]})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"Layers": 3}'])
def test_a_pinned_file_that_is_no_listing_is_named(tmp_path, text):
    with pytest.raises(BackendError, match="cannot be read") as caught:
        compared(FIRST, tmp_path, text)
    assert caught.value.kind == "bad data"
