"""Which layout a store has: a small document at its root, which every use of a store looks at first.

store.json    {"enginery": "store", "layout": 1}

A store without it was written by a release that did not know of it: layout 0, whose paths are those of 1, and whose
channels may have no history yet. It is read, and gets the document with the first write. A newer layout is refused before
anything else is read or written, since what is not understood may be broken. See docs/operations.md.
"""

from __future__ import annotations

import json
from typing import Final

from artifacts.errors import StoreError

LAYOUT: Final = 1
LAYOUT_NAME: Final = "store.json"


def layout_document() -> bytes:
    """Return the document of a store of this release's layout."""
    return json.dumps({"enginery": "store", "layout": LAYOUT}).encode() + b"\n"


def require_layout(uri: str, data: bytes | None) -> None:
    """Raise StoreError unless this release can use a store whose document this is (None: there is none)."""
    if data is None:
        return
    try:
        document = json.loads(data)
        found = document["layout"] if isinstance(document, dict) else None
    except (ValueError, KeyError, RecursionError):
        found = None
    if type(found) is not int or found < 0:
        raise StoreError(
            f"{uri}: {LAYOUT_NAME} does not say which layout this store has; if it is damaged, and no release newer than "
            f'this one ever wrote here, put {{"layout": {LAYOUT}}} in its place'
        )
    if found > LAYOUT:
        raise StoreError(
            f"{uri}: this store has layout {found}, and this release knows layouts up to {LAYOUT}; a newer Enginery wrote "
            "it: upgrade this one. Nothing was read or written"
        )
