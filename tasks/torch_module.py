"""A recipe's PyTorch module: built, given its weights, called by input names, its outputs in one order."""

from __future__ import annotations

import inspect
import json
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch

from tasks.code import load_callable, plain_words, recipe_code
from tasks.errors import BackendError, ModelCodeError
from tasks.stage import StageRequest

Inputs = Mapping[str, torch.Tensor]
# By what they are made of, while parts are run together in this process.
_MODELS: Final[dict[str, torch.nn.Module]] = {}


def load_module(request: StageRequest) -> torch.nn.Module:
    """Build the module of a recipe: fp32, eval() throughout, with its weights or its seeded initialisation.

    Raises ModelCodeError where the code fails or returns no module, BackendError("bad data") where the weights cannot
    be read or do not fit.
    """
    model = _model(request)
    module = (_part(model, request) if request.params.get("part") else model).float()
    # Recursively: an exporter restores the mode of the whole tree from the root (facts: toolchain.md section 0.6).
    module.eval()
    module.requires_grad_(requires_grad=False)
    return module


def _model(request: StageRequest) -> torch.nn.Module:
    """Build the model with its weights; parts that are run together are made of one."""
    params = request.params
    if params.get("kind") != "together":
        return _built(request)
    files = sorted(str(path) for path in request.inputs.values())
    same = json.dumps([files, *(params[key] for key in ("entry", "arguments", "seed"))], sort_keys=True)
    if same not in _MODELS:
        _MODELS[same] = _built(request)
    return _MODELS[same]


def _built(request: StageRequest) -> torch.nn.Module:
    params = request.params
    build = load_callable(request.inputs["code.tar"], params["entry"])
    torch.manual_seed(params["seed"])
    module = build(**params["arguments"])
    if params.get("part") and isinstance(module, Mapping):
        module = torch.nn.ModuleDict(dict(module))
    if not isinstance(module, torch.nn.Module):
        raise ModelCodeError(
            f"{params['entry']} returned {_describe(module)}; expected a torch.nn.Module with its layers built"
        )
    weights = next((path for name, path in sorted(request.inputs.items()) if name.startswith("weights.")), None)
    if weights is not None:
        _load_weights(module, _read_weights(weights), weights.name, params["entry"])
    return module


def _part(model: torch.nn.Module, request: StageRequest) -> torch.nn.Module:
    """Return one part of a model that has its weights: what the recipe's callable makes of it, or its attribute."""
    name, maker = request.params["part"], request.params["module"]
    if maker is not None:
        entry = f"{request.params['entry'].rpartition(':')[0]}:{maker}"
        # The module that was imported for the model: imported again, its classes would be others.
        make = getattr(sys.modules[entry.partition(":")[0]], maker, None)
        with recipe_code(f"calling {entry}"):
            part = make(model) if callable(make) else None
    else:
        entry, part = f"{type(model).__name__}.{name}", getattr(model, name, None)
        if part is None and isinstance(model, torch.nn.ModuleDict) and name in model:
            part = model[name]
    if not isinstance(part, torch.nn.Module):
        children = ", ".join(child for child, _module in model.named_children()) or "none"
        raise ModelCodeError(
            f"{entry}: expected a torch.nn.Module for the part {name!r}, found {_describe(part)} (the model's own: "
            f"{children}); name a callable that makes it under parts.{name}.module"
        )
    return part


def call_order(module: torch.nn.Module, names: Sequence[str]) -> list[str] | None:
    """Return the recipe's inputs in the order of forward's parameters, or None where they go by keyword.

    With one input its name is free. Raises ModelCodeError where several inputs are not named as forward's parameters
    (their order in YAML carries no meaning), or where forward takes nothing.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(names) == 1 and (positional or variadic) and (names[0] in positional[:1] or names[0] not in positional):
        return list(names)
    if set(names) == set(positional[: len(names)]):
        return positional[: len(names)]
    keywords = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if set(names) <= keywords or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    raise ModelCodeError(
        f"{type(module).__name__}.forward takes ({', '.join(p.name for p in parameters)}), the recipe names the inputs "
        f"{', '.join(names)}: give the recipe's inputs the names of forward's parameters"
    )


def run_module(module: torch.nn.Module, inputs: Inputs, doing: str) -> list[torch.Tensor]:
    """Run the module without gradients and return its output tensors, flat; raise ModelCodeError where it fails."""
    order = call_order(module, list(inputs))
    with recipe_code(doing), torch.inference_mode():
        result = module(**inputs) if order is None else module(*(inputs[name] for name in order))
    return flat_outputs(result)


def flat_outputs(result: object) -> list[torch.Tensor]:
    """Return the tensors of a module's result: a tensor, or tuples, lists and mappings of them (None is left out)."""
    if isinstance(result, torch.Tensor):
        return [result]
    if result is None:
        return []
    if isinstance(result, Mapping):  # and the output classes of transformers
        return [tensor for value in result.values() for tensor in flat_outputs(value)]
    if isinstance(result, (list, tuple)):
        return [tensor for value in result for tensor in flat_outputs(value)]
    raise ModelCodeError(f"the module returned {_describe(result)} among its outputs; expected tensors")


def check_output_count(found: Sequence[torch.Tensor], names: Sequence[str]) -> None:
    """Raise ModelCodeError where the module returns another number of tensors than the recipe names."""
    if len(found) != len(names):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in found) or "nothing"
        raise ModelCodeError(
            f"the module returns {len(found)} tensors ({shapes}), the recipe names {len(names)} outputs "
            f"({', '.join(names)}): name each of them, in order"
        )


class ByName(torch.nn.Module):
    """Calls a module by keyword and returns a flat tuple of tensors, for exporters, which pass positions."""

    def __init__(self, model: torch.nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = list(names)
        self.eval()

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Call the module with the inputs under their names."""
        order = call_order(self.model, self.names)
        by_name = dict(zip(self.names, inputs, strict=True))
        result = self.model(**by_name) if order is None else self.model(*(by_name[name] for name in order))
        return tuple(flat_outputs(result))


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(str(path)))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as err:
            raise _unreadable(path, f"not readable as safetensors: {err}", "fetch or save the weights again") from err
    _require_stored(path)
    try:
        content = torch.load(str(path), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        named = re.search(r"GLOBAL (\S+)", str(err))
        found = f" (it names {named[1]})" if named else ""
        raise _unreadable(
            path,
            f"refused: it is not a plain state dict, and reading it could run code{found}",
            "save only the tensors: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')",
        ) from err
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as err:
        raise _unreadable(path, f"torch.load: {plain_words(str(err), 400)}", "fetch or save the weights again") from err
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]  # a checkpoint of a trainer
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise _unreadable(path, f"expected a state dict, found {_describe(content)}", "save model.state_dict()")
    return dict(content)


def _require_stored(path: Path) -> None:
    """Refuse a checkpoint whose parts claim more bytes than the file has: `torch.save` never compresses them."""
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # of an older format, or damaged: torch says so
    size = path.stat().st_size
    if claimed > size:
        what = f"refused: it has {size} bytes, and claims to hold {claimed}"
        raise _unreadable(path, what, "save it with torch.save, which compresses nothing")


def _load_weights(module: torch.nn.Module, weights: dict[str, torch.Tensor], file: str, entry: str) -> None:
    wanted = module.state_dict()
    shared = {_storage(wanted[name]) for name in wanted if name in weights}
    # A tied parameter may be stored under one of its names only.
    missing = [name for name, value in wanted.items() if name not in weights and _storage(value) not in shared]
    unexpected = [name for name in weights if name not in wanted]
    shapes = [
        f"{name} is {list(weights[name].shape)} in the file, {list(value.shape)} in the module"
        for name, value in wanted.items()
        if name in weights and weights[name].shape != value.shape
    ]
    faults = [f"missing in the file: {_some(missing)}"] if missing else []
    faults += [f"not in the module: {_some(unexpected)}"] if unexpected else []
    faults += [f"other shapes: {_some(shapes)}"] if shapes else []
    if faults:
        raise BackendError(
            "bad data",
            f"{file} does not fit the module of {entry}: " + "; ".join(faults),
            "give the weights of this very module, or set source.arguments so that it is the one that was trained",
        )
    module.load_state_dict(weights, strict=not len(wanted) > len(weights))


def _storage(tensor: torch.Tensor) -> tuple[int, int, tuple[int, ...]]:
    # Tensors without elements share the address 0 without being tied.
    return (tensor.data_ptr() or id(tensor), int(tensor.storage_offset()), tuple(tensor.shape))


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"


def _describe(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    return "None" if value is None else f"a {type(value).__name__}"


def _unreadable(path: Path, what: str, advice: str) -> BackendError:
    return BackendError("bad data", f"{path.name}: {what}", advice)
