"""Tables of plans and builds show the words of frameworks as they are."""

from __future__ import annotations

import pytest

from enginery.tables import print_build, print_plan
from recipes.plan import Plan
from recipes.steps import Step
from tasks.report import plan_report

# To rich, the first is a closing tag (an error), and the second a style (left out).
WORDS = "crash: [/tmp] and [bold] and [E] said"


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_a_plan_shows_why_word_for_word(capsys):
    print_plan(plan_report(Plan("digits", (Step("export", "export", "failed", (WORDS,)),), ())), explain=True)
    assert WORDS in capsys.readouterr().out


def test_a_build_shows_why_word_for_word(capsys):
    step = {"stage": "export", "subject": "", "state": "failed", "seconds": 0.0, "why": [WORDS], "warnings": ["x"]}
    engine = {
        "runtime": "onnxruntime", "runtime_version": "1", "gpu": "cpu", "precision": {"asked": "fp32", "given": None},
        "state": "failed", "why": WORDS, "size": None, "parity": None, "metric": None, "source_metric": None,
        "metric_name": None, "executed": False, "path": None,
    }  # fmt: skip
    print_build({"recipe": "digits", "store": "file:///[/s]", "steps": [step], "engines": [engine]})
    out = capsys.readouterr().out
    assert WORDS in out
    assert f"failed: {WORDS}" in out
    assert "store: file:///[/s]" in out
    assert "asked" not in out
    assert "warning:  data: x" in out


def test_a_build_says_what_was_asked_what_was_given_and_why(capsys):
    engine = {
        "runtime": "onnxruntime", "runtime_version": "1", "gpu": "cpu", "precision": {"asked": "int8", "given": "fp32"},
        "state": "cached", "why": "", "size": None, "parity": None, "metric": None, "source_metric": None,
        "metric_name": None, "executed": True, "path": "p",
        "tried": [
            {"precision": "int8", "passed": False, "reasons": ["top1 0.5 < floor 0.9"]},
            {"precision": "fp16", "passed": False, "reasons": ["3 NaN or Inf in the outputs"]},
            {"precision": "fp32", "passed": True, "reasons": []},
        ],
    }  # fmt: skip
    print_build({"recipe": "digits", "store": "s", "steps": [], "engines": [engine]})
    said = "onnxruntime cpu: int8 asked, fp32 given: int8: top1 0.5 < floor 0.9; fp16: 3 NaN or Inf in the outputs"
    assert said in capsys.readouterr().out


def test_a_build_names_the_part_that_gave_way(capsys):
    part = {"precision": {"asked": "fp16", "given": "fp32"}, "tried": [
        {"precision": "fp16", "passed": False, "reasons": ["together: cer 0.3 > ceiling 0.1"]},
        {"precision": "fp32", "passed": True, "reasons": []},
    ]}  # fmt: skip
    engine = {
        "runtime": "onnxruntime", "runtime_version": "1", "gpu": "cpu", "precision": {"asked": "fp16", "given": "fp32"},
        "state": "cached", "why": "", "size": None, "parity": None, "metric": None, "source_metric": None,
        "metric_name": None, "executed": True, "path": "p", "tried": [], "parts": {"step": part},
    }  # fmt: skip
    print_build({"recipe": "digits", "store": "s", "steps": [], "engines": [engine]})
    assert (
        "onnxruntime cpu step: fp16 asked, fp32 given: fp16: together: cer 0.3 > ceiling 0.1" in capsys.readouterr().out
    )
