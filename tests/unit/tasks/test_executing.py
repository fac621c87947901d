"""Which engines can be executed after they were published."""

from __future__ import annotations

from artifacts.host import Host
from tasks.executing import why_not_here
from tests.unit.artifacts.test_resolve import engine


def test_a_source_model_is_executed_by_the_build_that_saves_it_and_not_later():
    saved = {"": {"form": "exported program", "inputs": ["image"], "outputs": ["logits"]}}
    facts = {"kind": "source", "instead_of": ["tensorrt-rtx:sm89"], "saved": saved}
    model = engine(runtime="torch", version="2.13.0+cpu", gpu="cpu", schema=3, fallback=facts)
    host = Host("here", "linux", "x86_64", frameworks={"torch": "2.13.0+cpu"})
    (reason,) = why_not_here(model, host)
    assert "not later" in reason
