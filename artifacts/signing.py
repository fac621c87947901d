"""Signatures in the OpenSSF model-signing format, made and checked by its own library.

What is signed is a set of names with the SHA-256 of each: of an engine, its manifest and every file
that the manifest names, so that `model_signing verify` takes a pulled folder as it is; of a channel's
move, its statement. The signature is a Sigstore bundle around a DSSE envelope around an in-toto
statement (OpenSSF Model Signing Specification 1.0). Keys are on the curves P-256, P-384 or P-521; one is
known by its fingerprint, the SHA-256 of its public half as PEM, which the bundle states as a hint.

The library takes 0.4 s to import, and is imported only where something is signed or checked.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from artifacts.errors import SigningError, TrustError
from artifacts.files import os_faults
from artifacts.refs import digest_bytes, is_digest
from artifacts.scratch import private_folder

if TYPE_CHECKING:
    from model_signing.hashing import Config as HashingConfig
    from model_signing.signing import Config as SigningConfig

    from artifacts.manifest import Manifest

# A path of a PEM file, or a `pkcs11:` URI (RFC 7512); the password of an encrypted file; a folder of PKCS#11 modules.
KEY: Final = "ENGINERY_SIGN_KEY"
PASSWORD: Final = "ENGINERY_SIGN_PASSWORD"  # noqa: S105 - the variable's name
MODULES: Final = "ENGINERY_SIGN_PKCS11_MODULES"
SECRETS: Final = (KEY, PASSWORD, MODULES)
# Beside a pulled manifest, where the reference verifier is pointed to.
MANIFEST_NAME: Final = "manifest.json"
SIGNATURE_NAME: Final = f"{MANIFEST_NAME}.sig"
# What signatures call what is no file of an engine.
STATEMENT_NAME: Final = "channel.json"
ATTESTATION_NAME: Final = "attestation.json"
SIGNATURE_BYTES: Final = 1 << 18
_ADVICE: Final = "install it with: pip install 'enginery[sign]'"


class Signer:
    """Signs with one private key; neither the key nor where it is is ever shown."""

    def __init__(self, config: SigningConfig) -> None:
        self._config = config
        # Stages publish from several threads, and a signature is made in two steps.
        self._signing = threading.Lock()

    def __repr__(self) -> str:
        return "Signer()"

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the key, as its signatures state it. Raises SigningError."""
        hint = hint_of(self.sign("which key is this", {"nothing": digest_bytes(b"")}))
        if hint is None:
            raise SigningError("the key's signatures name no key, so that nobody could check them")
        return hint

    def sign(self, subject: str, contents: Mapping[str, str]) -> bytes:
        """Return a signature over names and the SHA-256 of each, as JSON. Raises SigningError."""
        with self._signing, private_folder() as folder:
            path = folder / "signature"
            self._config.set_hashing_config(_known(subject, contents))
            try:
                self._config.sign(folder, path)
            except OSError as err:
                # Its key is opened by now; what a PKCS#11 module may say is not repeated.
                why = f"{_kind(err)}: {os.strerror(err.errno)}" if err.errno else _kind(err)
                raise SigningError(
                    f"{subject}: could not be signed ({why}); look at the temporary folder, {folder.parent}, and its disk, or set "
                    "TMPDIR to another"
                ) from None
            except Exception as err:  # noqa: BLE001 - of many kinds: cryptography's, a PKCS#11 module's
                raise SigningError(f"{subject}: could not be signed ({_kind(err)})") from None
            return path.read_bytes()


def open_signer(key: str, *, password: str | None = None) -> Signer:
    """Open a private key: an EC key's PEM file, or a `pkcs11:` URI (which needs `model-signing[pkcs11]`).

    Raises SigningError, which tells no secret, where there is no such key or the library is not installed.
    """
    if key.startswith("pkcs11:"):
        return _open_token(key)
    require_library()
    from model_signing.signing import Config

    config = Config()  # type: ignore[no-untyped-call]  # the library's has no annotation
    try:
        # The library hands the password to `cryptography`, which takes bytes; its annotation says text.
        secret: Any = None if password is None else password.encode()
        return Signer(config.use_elliptic_key_signer(private_key=key, password=secret))
    except OSError as err:
        raise SigningError(f"the signing key cannot be read: {key}: {err.strerror or _kind(err)}") from None
    except Exception as err:  # noqa: BLE001 - of many kinds: cryptography's
        why = "expected a PEM file with an EC private key on P-256, P-384 or P-521, and its password if it has one"
        if isinstance(err, TypeError):
            why = f"it is encrypted, or it is not and {PASSWORD} is set: {PASSWORD} holds its password"
        raise SigningError(f"the signing key cannot be used ({why})") from None


@cache  # a process logs in to a token once
def _open_token(uri: str) -> Signer:
    require_library()
    from model_signing.signing import Config

    config = Config()  # type: ignore[no-untyped-call]  # the library's has no annotation
    folders = [folder for folder in os.environ.get(MODULES, "").split(os.pathsep) if folder]
    try:
        return Signer(config.use_pkcs11_signer(pkcs11_uri=uri, module_paths=folders))
    except Exception as err:  # noqa: BLE001 - whatever a PKCS#11 module may raise
        needs = "needs pip install 'model-signing[pkcs11]', a module, and a token that has this key"
        why = f"PKCS#11: {_without_secrets(err, uri)}; {needs}"
        raise SigningError(f"the signing key cannot be used ({why})") from None


def signer_from_environment() -> Signer | None:
    """Open the key that `ENGINERY_SIGN_KEY` names, or return None where it names none. Raises SigningError."""
    key = os.environ.get(KEY)
    return open_signer(key, password=os.environ.get(PASSWORD)) if key else None


def require_signer() -> None:
    """Raise SigningError where `ENGINERY_SIGN_KEY` is set and surely of no use; imports nothing heavy."""
    key = os.environ.get(KEY)
    if key:
        require_library()
        if not key.startswith("pkcs11:") and not Path(key).is_file():
            raise SigningError(f"the signing key cannot be read: {key} is no file (set by {KEY})")


def require_library() -> None:
    """Raise SigningError where the library that signs and checks is not installed."""
    if find_spec("model_signing") is None:
        raise SigningError(f"signatures need model-signing; {_ADVICE}")
    # model-signing 1.1.1 imports OpenSSL and does not declare it.
    if find_spec("OpenSSL") is None:
        raise SigningError(f"signatures need pyopenssl beside model-signing; {_ADVICE}")


def signed_contents(manifest: Manifest, data: bytes) -> dict[str, str]:
    """Return what an engine's signature covers, by name: its manifest, of these bytes, and every file that it names."""
    return {MANIFEST_NAME: digest_bytes(data), **{name: entry.digest for name, entry in manifest.files.items()}}


def check_signature(signature: bytes, contents: Mapping[str, str], public_key: bytes) -> None:
    """Raise TrustError unless a signature is this key's, over exactly these names and digests.

    `public_key` is PEM. Raises SigningError where the library is not installed.
    """
    require_library()
    from model_signing.verifying import Config

    with private_folder() as folder:
        key, path = folder / "key", folder / "signature"
        with os_faults(str(folder)):
            key.write_bytes(public_key)
            path.write_bytes(signature)
        # Without a hint the library goes on, and says so on stdout.
        if hint_of(signature) is None:
            raise TrustError("the signature names no key")
        try:
            config = Config()  # type: ignore[no-untyped-call]  # the library's has no annotation
            checker = config.use_elliptic_key_verifier(public_key=key)
            checker.set_hashing_config(_known("", contents)).verify(folder, path)
        except Exception as err:  # of many kinds: whatever is no proof is a refusal
            raise TrustError(f"the signature does not hold ({_first_line(err)})") from err


def hint_of(signature: bytes) -> str | None:
    """Return the fingerprint of the key that a signature says it is by, which is no proof; None where it says none."""
    try:
        bundle = json.loads(signature)
        hint = bundle["verificationMaterial"]["publicKey"]["hint"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return hint if is_digest(hint) else None


def public_key(text: bytes) -> tuple[str, bytes]:
    """Return the fingerprint of a public key and the one PEM spelling of it. Raises ValueError where it is none."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_public_key(text)
    except (ValueError, UnsupportedAlgorithm) as err:
        raise ValueError("expected a PEM public key (-----BEGIN PUBLIC KEY-----)") from err
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in ("secp256r1", "secp384r1", "secp521r1"):
        raise ValueError("expected an EC key on P-256, P-384 or P-521")
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return digest_bytes(pem), pem


def _known(subject: str, contents: Mapping[str, str]) -> HashingConfig:
    """Return what the library hashes with, for contents whose digests are known: nothing is read again."""
    from model_signing._hashing.hashing import Digest
    from model_signing.hashing import Config, PathLike
    from model_signing.manifest import Manifest, SerializationType

    class Known(Config):
        def hash(self, model_path: PathLike, *, files_to_hash: object = None) -> Manifest:  # noqa: ARG002 - the library's
            how = SerializationType.from_args(
                {
                    "method": "files",
                    "hash_type": "sha256",
                    "allow_symlinks": False,
                    # It lies among the files once they are pulled.
                    "ignore_paths": [SIGNATURE_NAME],
                }
            )
            items = [how.new_item(name, Digest("sha256", bytes.fromhex(digest))) for name, digest in contents.items()]
            return Manifest(subject, items, how)

    return Known()  # type: ignore[no-untyped-call]  # the library's has no annotation


def _kind(err: Exception) -> str:
    return type(err).__name__


def _without_secrets(err: Exception, uri: str) -> str:
    """Return what a module says, or only of which kind it is where it repeats a secret part of the URI."""
    from urllib.parse import parse_qsl

    said = _first_line(err)
    secrets = [value for name, value in parse_qsl(uri.partition("?")[2]) if name.startswith("pin")]
    return _kind(err) if uri in said or any(secret in said for secret in secrets) else f"{_kind(err)}: {said}"


def _first_line(err: Exception) -> str:
    """Return an error's first line as it can be printed: it may repeat what a stranger's signature says."""
    line = _line_of(err)
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in line)


def _line_of(err: Exception) -> str:
    text = str(err).strip().splitlines()
    return (text[0][:300] if text else "") or _kind(err)
