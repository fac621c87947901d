"""Signatures: what the library makes of them, what it refuses, and that keys are never shown."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.errors import SigningError, TrustError
from artifacts.refs import digest_bytes
from artifacts.signing import (
    Signer,
    check_signature,
    hint_of,
    open_signer,
    public_key,
    require_signer,
    signed_contents,
    signer_from_environment,
)
from tests.engines import make_manifest
from tests.keys import KeyPair, make_key

FILES = {"manifest.json": b"{}", "model.plan": b"plan"}
CONTENTS = {name: digest_bytes(data) for name, data in FILES.items()}


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_key(tmp_path_factory.mktemp("key"))


class FullDisk:
    """A configuration of the library that finds no place for its signature."""

    def set_hashing_config(self, _hashing: object) -> None:
        pass

    def sign(self, _folder: Path, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_a_full_temporary_folder_is_told_and_one_that_others_took_is_in_nobodys_way(
    key: KeyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SigningError, match=r"could not be signed \(OSError: No space left on device\).*TMPDIR"):
        Signer(FullDisk()).sign("digits/t/b", CONTENTS)  # type: ignore[arg-type]
    (tmp_path / f"enginery-{os.getuid()}").mkdir(mode=0o777)
    check_signature(key.signer.sign("digits/t/b", CONTENTS), CONTENTS, key.pem)
    assert [path.name for path in tmp_path.iterdir()] == [f"enginery-{os.getuid()}"]


@pytest.fixture(scope="module")
def signature(key: KeyPair) -> bytes:
    return key.signer.sign("digits/t/b", CONTENTS)


def test_what_was_signed_is_accepted_and_nothing_else(key: KeyPair, signature: bytes, tmp_path: Path) -> None:
    check_signature(signature, CONTENTS, key.pem)
    assert hint_of(signature) == key.fingerprint
    other = make_key(tmp_path, "other")
    for contents in (
        CONTENTS | {"model.plan": digest_bytes(b"evil")},
        CONTENTS | {"more": digest_bytes(b"")},
        {"manifest.json": CONTENTS["manifest.json"]},
        {"Manifest.json": CONTENTS["manifest.json"], "model.plan": CONTENTS["model.plan"]},
        {},
    ):
        with pytest.raises(TrustError, match="does not hold"):
            check_signature(signature, contents, key.pem)
    with pytest.raises(TrustError, match="Key mismatch"):
        check_signature(signature, CONTENTS, other.pem)
    # One that claims to be by the trusted key.
    claimed = json.loads(other.signer.sign("digits/t/b", CONTENTS))
    claimed["verificationMaterial"]["publicKey"]["hint"] = key.fingerprint
    with pytest.raises(TrustError, match="does not hold"):
        check_signature(json.dumps(claimed).encode(), CONTENTS, key.pem)


@pytest.mark.parametrize("harm", ["signature", "payload", "wrong", ""])
def test_the_reference_verifier_takes_an_engine_with_its_signature(
    key: KeyPair, signature: bytes, tmp_path: Path, harm: str
) -> None:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    bundle = json.loads(signature)
    if harm == "signature":
        bundle["dsseEnvelope"]["signatures"][0]["sig"] = "MAAA"
    elif harm == "payload":
        bundle["dsseEnvelope"]["payload"] = bundle["dsseEnvelope"]["payload"][:-8] + "fQ=="
    elif harm:
        (tmp_path / "model.plan").write_bytes(b"evil")
    (tmp_path / "manifest.json.sig").write_text(json.dumps(bundle))
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(tmp_path)]
    command += ["--signature", str(tmp_path / "manifest.json.sig"), "--public_key", str(key.public)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (not harm), done.stderr


def test_threads_share_a_signer(key: KeyPair) -> None:
    signer = key.signer
    contents = [{"file": digest_bytes(bytes([number]))} for number in range(48)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet in the middle of what they do
    try:
        with ThreadPoolExecutor(8) as threads:
            signatures = list(threads.map(lambda one: signer.sign("x", one), contents))
    finally:
        sys.setswitchinterval(before)
    for one, made in zip(contents, signatures, strict=True):
        check_signature(made, one, key.pem)


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_other_curves(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    key = make_key(tmp_path, curve=curve)
    check_signature(key.signer.sign("x", CONTENTS), CONTENTS, key.pem)


def test_an_encrypted_key_needs_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = make_key(tmp_path, password=b"open sesame")
    monkeypatch.setenv("ENGINERY_SIGN_KEY", str(key.private))
    with pytest.raises(SigningError, match="ENGINERY_SIGN_PASSWORD holds its password"):
        signer_from_environment()
    monkeypatch.setenv("ENGINERY_SIGN_PASSWORD", "wrong word")
    with pytest.raises(SigningError) as caught:
        signer_from_environment()
    assert "wrong word" not in str(caught.value)
    monkeypatch.setenv("ENGINERY_SIGN_PASSWORD", "open sesame")
    signer = signer_from_environment()
    check_signature(signer.sign("x", CONTENTS), CONTENTS, key.pem)
    assert repr(signer) == "Signer()"


def test_keys_that_are_of_no_use(tmp_path: Path, key: KeyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SigningError, match=r"absent.pem: No such file"):
        open_signer(str(tmp_path / "absent.pem"))
    for text in (key.public.read_bytes(), b"", b"\x00" * 100):
        (tmp_path / "bad.pem").write_bytes(text)
        with pytest.raises(SigningError, match="expected a PEM file with an EC private key"):
            open_signer(str(tmp_path / "bad.pem"))
    with pytest.raises(SigningError, match="expected a PEM file"):
        open_signer(str(_odd_curve(tmp_path)))
    monkeypatch.delenv("ENGINERY_SIGN_KEY", raising=False)
    assert signer_from_environment() is None
    require_signer()
    monkeypatch.setenv("ENGINERY_SIGN_KEY", str(tmp_path / "absent.pem"))
    with pytest.raises(SigningError, match=r"absent.pem is no file"):
        require_signer()


def _odd_curve(folder: Path) -> Path:
    from cryptography.hazmat.primitives import serialization

    path = folder / "odd.pem"
    key = ec.generate_private_key(ec.SECP256K1())
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


def test_a_pin_is_never_told() -> None:
    with pytest.raises(SigningError) as caught:
        open_signer("pkcs11:token=none;object=none?pin-value=5ecret&module-path=/nonexistent.so")
    assert "PKCS#11" in str(caught.value)
    assert "5ecret" not in str(caught.value) + repr(caught.value.__cause__)
    assert caught.value.__suppress_context__


def test_public_keys() -> None:
    for text in (b"", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", b"\xff"):
        with pytest.raises(ValueError, match="expected"):
            public_key(text)


def test_without_the_library_nothing_is_taken_for_signed(key: KeyPair, signature: bytes) -> None:
    code = """
import sys
sys.modules["model_signing"] = None
from artifacts.errors import SigningError
from artifacts.signing import check_signature, open_signer
for call in (lambda: open_signer("x"), lambda: check_signature(b"{}", {}, b"")):
    try:
        call()
    except (SigningError, ValueError, ImportError) as err:
        print(type(err).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["SigningError", "SigningError"]


def test_an_engines_signature_covers_its_manifest_and_every_file() -> None:
    manifest = make_manifest()
    data = manifest.to_bytes()
    assert signed_contents(manifest, data) == {
        "manifest.json": digest_bytes(data),
        "model.plan": manifest.files["model.plan"].digest,
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=150)
@given(JSON, st.binary(max_size=200), st.integers(0, 2000), st.integers(1, 255))
def test_what_is_no_signature_is_refused_and_never_a_crash(
    key: KeyPair, signature: bytes, value: object, noise: bytes, position: int, change: int
) -> None:
    hinted = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": key.fingerprint}},
        "dsseEnvelope": value,
    }
    flipped = bytearray(signature)
    flipped[position % len(flipped)] ^= change
    for data in (json.dumps(value).encode(), json.dumps(hinted).encode(), noise, signature[:position]):
        if data != signature:
            hint_of(data)
            with pytest.raises(TrustError):
                check_signature(data, CONTENTS, key.pem)
    try:
        check_signature(bytes(flipped), CONTENTS, key.pem)
    except TrustError:
        pass
    else:  # white space, or a field that nothing depends on: what was signed is the same
        assert json.loads(flipped)["dsseEnvelope"]["payload"] == json.loads(signature)["dsseEnvelope"]["payload"]


def test_what_a_strangers_signature_says_can_be_printed(tmp_path: Path):
    key, contents = make_key(tmp_path), {"manifest.json": "0" * 64}
    bundle = json.loads(key.signer.sign("engine", contents))
    bundle["dsseEnvelope"]["payloadType"] = "\ud800\x1b[2J"
    with pytest.raises(TrustError) as told:
        check_signature(json.dumps(bundle).encode(), contents, key.pem)
    assert str(told.value).isprintable()
