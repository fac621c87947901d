"""Trust policies: what they may say, and whom they believe."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from artifacts.errors import IntegrityError, PolicyError, TrustError
from artifacts.signing import signed_contents
from artifacts.trust import Trust, TrustPolicy
from enginery.trusting import UNCHECKED, load_trust, trust_of
from tests.engines import make_manifest
from tests.keys import KeyPair, make_key, trust, write_policy

MANIFEST = make_manifest()
DATA = MANIFEST.to_bytes()
NOW = dt.datetime(2026, 6, 1, tzinfo=dt.timezone.utc)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[KeyPair]:
    folder = tmp_path_factory.mktemp("keys")
    return [make_key(folder, f"k{number}") for number in range(3)]


def signed(*keys: KeyPair) -> dict[str, bytes]:
    contents = signed_contents(MANIFEST, DATA)
    return {key.fingerprint: key.signer.sign("digits", contents) for key in keys}


def test_an_engine_needs_one_signature_of_a_key_that_is_allowed(keys: list[KeyPair]) -> None:
    assert trust(keys[0]).check_engine(MANIFEST, DATA, signed(keys[0])) == keys[0].fingerprint
    # Beside another's, in whichever order they come.
    assert trust(keys[1]).check_engine(MANIFEST, DATA, signed(*keys)) == keys[1].fingerprint
    with pytest.raises(TrustError, match=r"engine digits/.* is not signed, and trust.yaml asks for it"):
        trust(keys[0]).check_engine(MANIFEST, DATA, {})
    with pytest.raises(TrustError, match=f"the key {keys[1].fingerprint[:16]} is not known"):
        trust(keys[0]).check_engine(MANIFEST, DATA, signed(keys[1]))


def test_what_was_altered_is_refused(keys: list[KeyPair]) -> None:
    signatures = signed(keys[0])
    longer = MANIFEST.model_copy(update={"plan": "other"})
    with pytest.raises(TrustError, match="k0: the signature does not hold"):
        trust(keys[0]).check_engine(longer, longer.to_bytes(), signatures)
    with pytest.raises(TrustError, match="k0: the signature does not hold"):
        trust(keys[0]).check_engine(MANIFEST, DATA, {keys[0].fingerprint: signed(keys[1])[keys[1].fingerprint]})


@pytest.mark.parametrize(
    ("facts", "now", "refusal"),
    [
        ({"not_after": "2026-06-01T00:00:00Z"}, NOW, None),
        ({"not_after": "2026-06-01T00:00:00Z"}, NOW + dt.timedelta(seconds=1), r"k0 expired on 2026-06-01T00:00:00Z"),
        ({"not_before": "2026-06-01T02:00:00+02:00"}, NOW, None),
        (
            {"not_before": "2026-06-01T00:00:01Z"},
            NOW,
            r"k0 is valid from 2026-06-01T00:00:01Z on, and it is 2026-06-01T00",
        ),
    ],
)
def test_a_key_has_its_time(keys: list[KeyPair], facts: dict[str, str], now: dt.datetime, refusal: str | None) -> None:
    judge = trust(keys[0], now=now, **facts)
    if refusal is None:
        assert judge.check_engine(MANIFEST, DATA, signed(keys[0]))
    else:
        with pytest.raises(TrustError, match=refusal):
            judge.check_engine(MANIFEST, DATA, signed(keys[0]))


@pytest.mark.parametrize(
    ("rule", "channel", "allowed"),
    [
        ({"recipes": ["digits"]}, None, True),
        ({"recipes": ["swin", "dig*"]}, None, True),
        ({"recipes": ["Digits", "digit", "d?git"]}, None, False),
        ({"sign": ["channels"]}, None, False),
        ({"channels": ["staging"]}, "staging", True),
        ({"channels": ["staging"]}, "production", False),
        ({"channels": ["staging"]}, None, True),
        ({"channels": ["prod*"], "sign": ["engines"]}, "production", True),
    ],
)
def test_a_key_may_sign_what_its_rules_say(
    keys: list[KeyPair], rule: dict[str, list[str]], channel: str | None, allowed: bool
) -> None:
    judge = trust(keys[0], keys[1], rules=[{"keys": ["k1"]}, {"keys": ["k0"], **rule}])
    if allowed:
        assert judge.check_engine(MANIFEST, DATA, signed(keys[0]), channel) == keys[0].fingerprint
    else:
        with pytest.raises(TrustError, match="k0 may not sign engines of digits"):
            judge.check_engine(MANIFEST, DATA, signed(keys[0]), channel)


def test_rules_do_not_add_up(keys: list[KeyPair]) -> None:
    """One rule has to allow all of it: a key for one recipe's staging and another's production has no third."""
    rules = [
        {"keys": ["k0"], "recipes": ["digits"], "channels": ["staging"]},
        {"keys": ["k0"], "recipes": ["swin"], "channels": ["production"]},
    ]
    with pytest.raises(TrustError, match="may not sign engines of digits by channel production"):
        trust(keys[0], rules=rules).check_engine(MANIFEST, DATA, signed(keys[0]), "production")


def test_signatures_of_engines_are_none_of_moves(keys: list[KeyPair]) -> None:
    from artifacts.refs import digest_bytes
    from artifacts.signing import STATEMENT_NAME

    judge = trust(keys[0])
    statement = b'{"build":"fp16-a"}'
    move = keys[0].signer.sign("channel", {STATEMENT_NAME: digest_bytes(statement)})
    assert judge.check_move(statement, move, "digits", "production") == keys[0].fingerprint
    for data, signature in (
        (statement, None),
        (statement, b"{}"),
        (statement + b" ", move),
        (DATA, signed(keys[0])[keys[0].fingerprint]),
    ):
        with pytest.raises(TrustError):
            judge.check_move(data, signature, "digits", "production")
    with pytest.raises(TrustError, match="may not sign channels"):
        trust(keys[0], rules=[{"keys": ["k0"], "sign": ["engines"]}]).check_move(
            statement, move, "digits", "production"
        )


def test_a_local_folder_is_judged_by_the_same_rules(keys: list[KeyPair]) -> None:
    judge = trust(keys[0])
    judge(DATA, signed(keys[0])[keys[0].fingerprint])
    for signature in (None, b"", b"{}", signed(keys[1])[keys[1].fingerprint]):
        with pytest.raises(TrustError):
            judge(DATA, signature)
    with pytest.raises(IntegrityError):
        judge(b"{}", signed(keys[0])[keys[0].fingerprint])


# ---- policy files


def test_a_policy_names_key_files_beside_it(
    keys: list[KeyPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = make_key(tmp_path)
    path = write_policy(tmp_path, key)
    judge = load_trust(path)
    assert list(judge.policy.keys) == [key.fingerprint]
    assert judge.policy.origin == str(path)
    monkeypatch.setenv("ENGINERY_TRUST", str(path))
    assert list(trust_of(None).policy.keys) == [key.fingerprint]
    assert trust_of(judge) is judge
    assert trust_of(UNCHECKED) is None
    monkeypatch.delenv("ENGINERY_TRUST")
    assert trust_of(None) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("enginery-trust: 2\nkeys: {a: {public_key: a.pub}}\nallow: [{keys: [a]}]", r"trust.yaml:1: enginery-trust: "),
        ("enginery-trust: 1\nkeys: {}\nallow: [{keys: [a]}]", r"trust.yaml:2: keys: "),
        ("enginery-trust: 1\nkeys:\n  a: {public_key: a.pub}\nallow: []", r"trust.yaml:4: allow: "),
        ("enginery-trust: 1\nkeys:\n  a: {public_key: a.pub}\nallow:\n  - {keys: [b]}", r"trust.yaml:5: .*no key 'b'"),
        ("enginery-trust: 1\nkeys:\n  a: {public_key: a.pub}\nkeys:\n  a: {}\nallow: []", "keys"),
        ("enginery-trust: 1\nkeys:\n  a: {public_key: a.pub, not_aftr: x}\nallow: [{keys: [a]}]", r"yaml:3: .*not_aftr"),
        ("enginery-trust: 1\nkeys:\n  a: {public_key: none.pub}\nallow: [{keys: [a]}]", r"none.pub: No such file"),
        ("enginery-trust: 1\nkeys:\n  a: {public_key: trust.yaml}\nallow: [{keys: [a]}]", r"yaml:3: .*PEM public key"),
        (
            "enginery-trust: 1\nkeys:\n  a: {public_key: a.pub, not_after: 2026-01-01T00:00:00}\nallow: [{keys: [a]}]",
            "needs a time zone",
        ),
        ("enginery-trust: 1\nkeys:\n  a: {public_key: a.pub, fingerprint: 00ff}\nallow: [{keys: [a]}]", "the key's is"),
        (
            "enginery-trust: 1\nkeys:\n  a: {public_key: a.pub}\n  b: {public_key: a.pub}\nallow: [{keys: [a]}]",
            r"trust.yaml:4: keys.b: is the key a again",
        ),
        (
            "enginery-trust: 1\nkeys:\n  a: {public_key: a.pub}\nallow:\n  - {keys: [a], sign: [everything]}",
            r"trust.yaml:5: allow.0.sign.0",
        ),
        ("enginery-trust: 1\nkeys:\n  a: {public_key: a.pub}\nallow:\n  - {keys: [a], recipe: [x]}", "allow.0.recipe: Extra"),
    ],
)  # fmt: skip
def test_policies_that_say_nothing_sure(tmp_path: Path, text: str, said: str) -> None:
    make_key(tmp_path, "a")
    (tmp_path / "trust.yaml").write_text(text)
    with pytest.raises(PolicyError, match=said):
        load_trust(tmp_path / "trust.yaml")


def test_a_policy_that_is_not_there_is_no_policy_of_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINERY_TRUST", str(tmp_path / "absent.yaml"))
    with pytest.raises(PolicyError, match=r"absent.yaml.*no such file"):
        trust_of(None)


def test_by_default_the_judges_clock_counts(keys: list[KeyPair]) -> None:
    assert abs(Trust(TrustPolicy("x", {}, ())).now() - dt.datetime.now(dt.timezone.utc)) < dt.timedelta(minutes=1)
