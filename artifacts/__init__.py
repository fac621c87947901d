"""What is kept: references, keys, action records, manifests, and the stores that hold them.

Enters: bytes and JSON values. Leaves: `ArtifactRef`, `Action`, `ActionRecord`, `Manifest`, and a
`Store` that is a folder or S3. Imports nothing of Enginery: every other layer stands on this one.
Map: `refs` (names of bytes), `keys` (the one key function), `records`, `manifest`, `provenance`,
`resolve` (which engine may a host load), `signing` and `trust` (whose signatures count), `channels`,
`promotion` (may an engine be promoted), `seen` (what a reader knows of channels), `store` (Protocol),
`folder` and `s3` (implementations, over `files`, `scratch`, `s3_conditions` and `s3_faults`), `cache`
(blobs and records), `checked` (documents with a digest), `fresh_plans`, `gathered`, `catalog` (engines), `errors`.
"""
