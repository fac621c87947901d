"""Files that are sent to S3 in parts."""

from __future__ import annotations

import random
from pathlib import Path

from artifacts.refs import BYTES, ArtifactRef, digest_bytes
from artifacts.s3_multipart import PART_BYTES


def ref_of(data: bytes) -> ArtifactRef:
    """Return the reference to these bytes."""
    return ArtifactRef(digest_bytes(data), len(data), BYTES)


def large_file(tmp_path: Path, parts: int = 4) -> tuple[Path, ArtifactRef]:
    """Write a file that goes in so many parts."""
    data = random.Random(parts).randbytes((parts - 1) * PART_BYTES + 5)
    source = tmp_path / "large"
    source.write_bytes(data)
    return source, ref_of(data)
