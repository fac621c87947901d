"""A PyTorch module as a program that loads without the code that made it: torch.export's, else TorchScript.

Forms, the most wanted first: an exported program; TorchScript that was scripted, which keeps decisions by value; TorchScript that was
traced. A form is kept only if what was saved, loaded again, gives what the module gives at the recipe's profiles.
"""

from __future__ import annotations

import functools
import io
import json
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from artifacts.manifest import EXPORTED_PROGRAM
from tasks.code import plain_words
from tasks.errors import BackendError, TaskError
from tasks.exporter_words import Noise, first_sentence, summary
from tasks.torch_module import ByName, call_order, flat_outputs, run_module
from tasks.tracing import decisions_by_value

SCRIPTED: Final = "TorchScript (scripted)"
TRACED: Final = "TorchScript (traced)"
# Of the form, not of its precision: what the saved program gives is judged by the recipe's gates afterwards.
_ALIKE: Final = 1e-2

Inputs = Mapping[str, torch.Tensor]
Program = Callable[..., Any]


def save_program(
    module: torch.nn.Module,
    tensors: Mapping[str, Mapping[str, Any]],
    sample: Inputs,
    cases: Sequence[tuple[str, Inputs]],
    folder: Path,
    noise: Noise,
) -> dict[str, Any]:
    """Write a module in the first form that works, and return {"plan", "form", "inputs", "refused"}.

    `sample` is what is traced, `cases` what the saved program has to give the module's outputs at. Raises
    BackendError("unsupported operator") with what was wrong with every form where there is none.
    """
    order = call_order(module, list(tensors)) or sorted(tensors)
    expected = [run_module(module, inputs, f"running the module at {name}") for name, inputs in cases]
    refused: list[str] = []
    ways: tuple[tuple[str, str, Callable[[Path], None]], ...] = (
        (EXPORTED_PROGRAM, "model.pt2", functools.partial(_export, module, tensors, sample, order)),
        (SCRIPTED, "model.pt", functools.partial(_script, module, list(tensors))),
        (TRACED, "model.pt", functools.partial(_trace, module, sample, order, noise)),
    )
    for form, name, write in ways:
        try:
            write(folder / name)
            program = load_program((folder / name).read_bytes(), form)
            for (case, inputs), wanted in zip(cases, expected, strict=True):
                _compare(wanted, run_program(program, [inputs[one] for one in order]), case)
        except TaskError:
            raise
        except Exception as err:  # noqa: BLE001 - whatever a form's maker says is why another one is made
            refused.append(f"{form}: {summary(err)}")
            (folder / name).unlink(missing_ok=True)
        else:
            return {"plan": name, "form": form, "inputs": order, "refused": refused}
    raise BackendError(
        "unsupported operator",
        f"the module cannot be saved without its code: {'; '.join(refused)}",
        "ask for fallback: onnx or none, or change the module as the first of these says",
    )


def load_program(data: bytes, form: str, device: str = "cpu") -> Program:
    """Load what `save_program` wrote. It runs code of the file, whose digest and signature were checked before."""
    if form == EXPORTED_PROGRAM:
        exported = torch.export.load(io.BytesIO(data))
        if device != "cpu":
            from torch.export.passes import move_to_device_pass

            exported = move_to_device_pass(exported, device)
        return exported.module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(io.BytesIO(data), map_location=device)  # type: ignore[no-untyped-call, no-any-return]


def run_program(program: Program, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Run it on tensors in its order, without gradients, and return what it gives, flat."""
    with torch.inference_mode():
        return flat_outputs(program(*inputs))


def _export(
    module: torch.nn.Module, tensors: Mapping[str, Mapping[str, Any]], sample: Inputs, order: Sequence[str], path: Path
) -> None:
    shapes = tuple(
        {at: torch.export.Dim.DYNAMIC for at, axis in enumerate(tensors[name]["shape"]) if isinstance(axis, str)}
        for name in order
    )
    arguments = tuple(sample[name] for name in order)
    program = torch.export.export(ByName(module, order), arguments, dynamic_shapes=(shapes,), strict=False)
    for graph in program.graph_module.modules():
        if isinstance(graph, torch.fx.GraphModule):
            for node in graph.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this host, and lines of the recipe's code
    torch.export.save(program, path)


def _script(module: torch.nn.Module, names: list[str], path: Path) -> None:
    if call_order(module, names) is None:
        raise TypeError(f"forward takes {', '.join(names)} by keyword")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        _save_script(torch.jit.script(module), path)


def _trace(
    module: torch.nn.Module,
    sample: Inputs,
    order: Sequence[str],
    noise: Noise,
    path: Path,
) -> None:
    before = len(noise.caught)
    traced: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
        ByName(module, order), tuple(sample[name] for name in order), check_trace=False
    )
    suspects = {
        (one.filename, one.lineno): first_sentence(one.message)
        for one in noise.caught[before:]
        if one.category.__name__ == "TracerWarning"
    }
    if suspects:
        probes = [sample, *({name: one.new_full(one.shape, edge) for name, one in sample.items()} for edge in (0, 1))]
        found = decisions_by_value(
            lambda index: run_module(module, probes[index], "running the module on probe inputs"), len(probes), suspects
        )
        if found:
            places = "; ".join(f"{plain_words(place[0])}:{place[1]}: {suspects[place]}" for place in found)
            raise ValueError(f"it decides by the values of its inputs: {places}")
    _save_script(traced, path)


def _save_script(script: Any, path: Path) -> None:
    """Write TorchScript without its .debug_pkl (lines of the recipe's code, with paths that are others at every save).

    PyTorch needs neither those nor the checksum over all members, which would be another each time too.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        script.save(str(Path(folder, path.name)))
        with zipfile.ZipFile(Path(folder, path.name)) as made, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as kept:
            for member in made.infolist():
                if not member.filename.endswith((".debug_pkl", "/.data/serialization_id")):
                    plain = zipfile.ZipInfo(member.filename)  # of a fixed date
                    plain.file_size = member.file_size
                    with made.open(member) as source, kept.open(plain, "w") as target:
                        shutil.copyfileobj(source, target, 1 << 20)


def _compare(wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor], case: str) -> None:
    shapes = [[list(one.shape) for one in outputs] for outputs in (wanted, found)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"at {case} it gives {json.dumps(shapes[1])}, the module {json.dumps(shapes[0])}")
    for index, (one, other) in enumerate(zip(wanted, found, strict=True)):
        finite = one.double()[torch.isfinite(one)]
        scale = float(finite.abs().max()) if finite.numel() else 0.0
        if not torch.allclose(one.double(), other.double(), rtol=0.0, atol=_ALIKE * (scale or 1.0), equal_nan=True):
            raise ValueError(f"at {case} output {index} is not the module's")
