"""Commands on signatures: sign."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from enginery.asking import KeyOption, open_catalog, the_engine
from enginery.output import (
    DEFAULT_STORE,
    FAILED,
    WRONG,
    JsonOption,
    StoreOption,
    explains_errors,
    note,
    print_json,
    stop,
)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("sign")(sign)


@explains_errors
def sign(
    engines: Annotated[
        list[str], typer.Argument(metavar="ENGINE...", help="Names, or parts of them that no other engine has.")
    ],
    key: KeyOption = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Sign published engines: their manifests, and with them every file that these name, in the OpenSSF format.

    Signatures of other keys stay. `enginery build` signs what it publishes where ENGINERY_SIGN_KEY is set. A
    signature says that you stand for these bytes: sign what this host built, or what you pulled and tried.

    Example: enginery sign digits/onnxruntime-1.31.1-cpu/fp32 --key release.pem
    """
    from artifacts.signing import PASSWORD, hint_of, open_signer

    if not key:
        stop(WRONG, "with which key? --key FILE, or ENGINERY_SIGN_KEY (a PEM file, or a pkcs11: URI)")
    signer = open_signer(key, password=os.environ.get(PASSWORD))
    catalog = open_catalog(store)
    found = [the_engine(catalog, text) for text in engines]
    read = {}
    for engine in dict.fromkeys(found):
        data = catalog.manifest_bytes(engine)
        manifest = catalog.read_manifest(engine, data)
        if not manifest.verification.passed:
            stop(FAILED, f"{engine} is not signed: its gates did not pass")
        read[engine] = (manifest, data)
    signed = []
    for engine, (manifest, data) in read.items():
        path = catalog.sign(manifest, data, signer)
        signed.append({"engine": str(engine), "path": path, "key": hint_of(catalog.store.read(path))})
        note(f"{engine}: signed ({path})")
    if as_json:
        print_json(signed)
