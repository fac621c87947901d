"""Key pairs and trust policies for tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from artifacts.signing import Signer, open_signer, public_key
from artifacts.trust import Trust, TrustPolicy


@dataclass(frozen=True)
class KeyPair:
    private: Path
    public: Path
    fingerprint: str
    pem: bytes

    @property
    def signer(self) -> Signer:
        return open_signer(str(self.private))


def make_key(folder: Path, name: str = "key", curve: Any = None, password: bytes | None = None) -> KeyPair:
    key = ec.generate_private_key(curve or ec.SECP256R1())
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden))
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return KeyPair(private, public, *public_key(public.read_bytes()))


def trust(*keys: KeyPair, now: Any = None, rules: list[dict[str, Any]] | None = None, **facts: Any) -> Trust:
    """Trust keys, named k0, k1...; `facts` are every key's, `rules` default to all keys for everything."""
    names = [f"k{number}" for number in range(len(keys))]
    document = {
        "enginery-trust": 1,
        "keys": {name: {"public_key": key.pem.decode(), **facts} for name, key in zip(names, keys, strict=True)},
        "allow": rules if rules is not None else [{"keys": names}],
    }
    policy = TrustPolicy.from_document(json.loads(json.dumps(document)), "trust.yaml", Path.read_bytes)
    return Trust(policy) if now is None else Trust(policy, lambda: now)


def write_policy(folder: Path, *keys: KeyPair, rules: str = "") -> Path:
    """Write a policy that names key files beside it."""
    named = "".join(f"  k{number}: {{public_key: {key.public.name}}}\n" for number, key in enumerate(keys))
    names = ", ".join(f"k{number}" for number in range(len(keys)))
    path = folder / "trust.yaml"
    path.write_text(f"enginery-trust: 1\nkeys:\n{named}allow:\n{rules or f'  - {{keys: [{names}]}}'}\n")
    return path
