"""References: an artifact is immutable bytes, named by their SHA-256."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from artifacts.errors import IntegrityError

CHUNK_BYTES: Final = 1 << 20
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")

JSON: Final = "application/json"
ONNX: Final = "application/onnx"
ONNX_DATA: Final = "application/vnd.enginery.onnx-data"
SAFETENSORS: Final = "application/vnd.safetensors"
TAR: Final = "application/x-tar"
TEXT: Final = "text/plain"
ENGINE_PLAN: Final = "application/vnd.nvidia.tensorrt-plan"
BYTES: Final = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class ArtifactRef:
    """Name of immutable bytes: lower-case hex SHA-256, size in bytes, media type."""

    digest: str
    size: int
    media_type: str

    def __post_init__(self) -> None:
        if not is_digest(self.digest):
            raise IntegrityError(f"{self.digest!r} is not a SHA-256 digest (expected 64 lower-case hex digits)")
        if type(self.size) is not int or self.size < 0:
            raise IntegrityError(f"artifact {self.digest[:12]}: size must be a number of bytes, got {self.size!r}")

    def to_json(self) -> dict[str, Any]:
        """Return the reference as JSON values."""
        return {"digest": self.digest, "size": self.size, "media_type": self.media_type}

    @classmethod
    def from_json(cls, value: object) -> ArtifactRef:
        """Read back what `to_json` wrote; raise IntegrityError on anything else."""
        if not isinstance(value, dict) or set(value) != {"digest", "size", "media_type"}:
            raise IntegrityError(f"not an artifact reference: {value!r}")
        if not isinstance(value["digest"], str) or not isinstance(value["media_type"], str):
            raise IntegrityError(f"not an artifact reference: {value!r}")
        return cls(value["digest"], value["size"], value["media_type"])


def is_digest(text: object) -> bool:
    """Tell whether `text` is a SHA-256 in the one spelling that is used: 64 lower-case hex digits."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def digest_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file, read in chunks so that memory stays flat."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def require_size(what: str, ref: ArtifactRef, size: int) -> None:
    """Raise IntegrityError unless `size`, in bytes, is the reference's."""
    if size != ref.size:
        raise IntegrityError(f"{what}: {size} bytes, expected {ref.size} of {ref.digest[:12]}")


def require_match(what: str, ref: ArtifactRef, digest: str, size: int) -> None:
    """Raise IntegrityError unless bytes of this SHA-256 and size are what the reference names."""
    require_size(what, ref, size)
    if digest != ref.digest:
        raise IntegrityError(f"{what}: its SHA-256 is {digest[:12]}, expected {ref.digest[:12]}")
