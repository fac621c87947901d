"""In which form a PyTorch module is saved: an exported program, else TorchScript, and only one that gives what the module gives."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tasks.errors import BackendError
from tasks.exporter_words import quiet

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

TENSORS = {"x": {"dtype": "float32", "shape": ["rows", 4]}}


class Plain(torch.nn.Module):
    def forward(self, x):
        return {"twice": 2 * x, "sum": x.sum(1)}


class ByValue(torch.nn.Module):
    """Decides by a value: neither torch.export nor a trace holds it, a script does."""

    def forward(self, x):
        if bool(x.sum() > 0):
            return x + 1
        return x - 1


class ByStatistic(torch.nn.Module):
    """Of a fixed batch norm's kind: a script refuses **kwargs, torch.export a number that leaves the graph, a trace keeps it."""

    def forward(self, x, **_unused):
        return x * float(torch.ones(3).sum().item())


class Neither(torch.nn.Module):
    def forward(self, x, **_unused):
        return x + 1 if bool(x.sum() > 0) else x - 1


def saved(module, folder):
    from tasks.torch_program import save_program

    def rows(count, sign=1):
        return {"x": sign * torch.arange(4.0 * count).reshape(count, 4)}

    cases = [("min", rows(1)), ("max", rows(3, -1))]
    with quiet("torch") as noise:
        return save_program(module.eval(), TENSORS, rows(2), cases, folder, noise)


@pytest.mark.parametrize(
    ("module", "form", "plan", "refused"),
    [
        (Plain, "exported program", "model.pt2", []),
        (ByValue, "TorchScript (scripted)", "model.pt", ["exported program"]),
        (ByStatistic, "TorchScript (traced)", "model.pt", ["exported program", "TorchScript (scripted)"]),
    ],
)
def test_the_first_form_that_gives_what_the_module_gives_is_kept(tmp_path, module, form, plan, refused):
    from tasks.torch_program import load_program, run_program

    facts = saved(module(), tmp_path)
    assert (facts["form"], facts["plan"], facts["inputs"]) == (form, plan, ["x"])
    assert [why.partition(":")[0] for why in facts["refused"]] == refused
    assert [path.name for path in tmp_path.iterdir()] == [plan]
    data = (tmp_path / plan).read_bytes()
    with zipfile.ZipFile(tmp_path / plan) as archive:
        for name in archive.namelist():
            assert Path(__file__).name.encode() not in archive.read(name), name
    program = load_program(data, form)
    for x in (torch.ones(5, 4), -torch.ones(1, 4)):
        found = run_program(program, [x])
        wanted = module()(x)
        for one, other in zip(found, wanted.values() if isinstance(wanted, dict) else [wanted], strict=True):
            torch.testing.assert_close(one, other)


def test_what_no_form_holds_is_refused_with_what_each_said(tmp_path):
    with pytest.raises(BackendError, match="cannot be saved without its code") as caught:
        saved(Neither(), tmp_path)
    for words in ("exported program: ", "TorchScript (scripted): ", "it decides by the values of its inputs: "):
        assert words in caught.value.message
    assert not list(tmp_path.iterdir())


class Endless(torch.nn.Module):
    """Gives an infinite value beside finite ones."""

    def forward(self, x):
        return torch.cat([x, x.new_full((x.shape[0], 1), float("inf"))], 1)


def test_an_infinite_output_does_not_hide_that_finite_ones_differ():
    from tasks.torch_program import _compare

    wanted = Endless()(torch.ones(2, 4))
    _compare([wanted], [wanted.clone()], "min")
    other = wanted.clone()
    other[0, 0] = 2
    with pytest.raises(ValueError, match="output 0 is not the module's"):
        _compare([wanted], [other], "min")
