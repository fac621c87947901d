"""Reading data sets: an .npz, a folder of arrays, a folder of images, or what a recipe's callable returns.

Every reader returns whole arrays by name, first axis samples, in a fixed order; nothing is ever unpickled, and what a
file declares is compared with MEMORY_LIMIT before it is read.
"""

from __future__ import annotations

import lzma
import math
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.lib import format as npy

from tasks.errors import BackendError, ModelCodeError

Array = np.ndarray[Any, np.dtype[Any]]

# Fewer samples do not stand for the data.
LEAST_SAMPLES: Final = 16
MOST_HELD_OUT: Final = 32
_EVERY: Final = 8
# No calibration or test set of a recipe needs more; a decompression bomb ends here.
MEMORY_LIMIT: Final = 8 << 30
# What zipfile and its decompressors raise for an archive that is damaged, encrypted, or of a method that they lack.
_UNREADABLE: Final = (
    zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError, RuntimeError,
)  # fmt: skip
# What numpy raises for a header that is none: it is parsed as a Python literal, and nesting exhausts that parser.
_NO_HEADER: Final = (*_UNREADABLE, TypeError, SyntaxError, tokenize.TokenError, MemoryError)
_MOST_AXES: Final = 32
# By its name alone Pillow would take a file for what its first bytes say, and run Ghostscript for some of these.
_IMAGE_FORMATS: Final = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM")
_IMAGE_SUFFIXES: Final = frozenset([".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"])


def choose(count: int, samples: int | None, order: str, seed: int) -> Array:
    """Return the rows to take of `count`: the first ones, or a choice by Generator(PCG64(seed)).

    Raises BackendError("bad data") for an empty set, and where fewer samples exist than are asked for.
    """
    if count == 0:
        raise _bad("the data set is empty", "point `data` at samples")
    if samples is not None and samples > count:
        raise _bad(f"{samples} samples were asked for, the data set has {count}", f"set samples to {count} or less")
    rows = np.random.Generator(np.random.PCG64(seed)).permutation(count) if order == "shuffled" else np.arange(count)
    return rows[:samples]


def held_out(count: int) -> Array:
    """Return which of `count` calibration samples are kept out of calibration, to judge what it makes by.

    Every eighth, or fewer where that were more than 32, evenly spread. Below 16 samples none can be spared: then it is none.
    """
    if count < LEAST_SAMPLES:
        return np.arange(0)
    step = max(_EVERY, count // MOST_HELD_OUT)
    return np.arange(step - 1, count, step)[:MOST_HELD_OUT]


def without_held_out(data: Mapping[str, Array]) -> dict[str, Array]:
    """Return calibration data without the samples that are kept to judge by."""
    return {name: np.delete(array, held_out(len(array)), axis=0) for name, array in data.items()}


def batches(
    arrays: Mapping[str, Array], tensors: Mapping[str, Mapping[str, Any]], batch: int
) -> Iterator[tuple[int, dict[str, Array]]]:
    """Yield (samples, inputs) over all samples of the inputs, `batch` of them at a time.

    Where the first axis of an input is fixed, every batch has that extent, and the last repeats the last sample to fill
    it: only the first `samples` rows count. Raises BackendError("bad data") for an input that `arrays` lacks.
    """
    absent = sorted(set(tensors) - set(arrays))
    if absent:
        raise _bad(
            f"the data set lacks {', '.join(absent)} (it has: {', '.join(sorted(arrays))})",
            "name the arrays in the data set's `fields`",
        )
    fixed = {extent for tensor in tensors.values() for extent in tensor["shape"][:1] if isinstance(extent, int)}
    step = max(fixed, default=batch)
    count = min(len(arrays[name]) for name in tensors)
    for start in range(0, count, step):
        samples = min(step, count - start)
        rows = np.arange(start, start + (step if fixed else samples)).clip(max=count - 1)
        yield samples, {name: arrays[name][rows] for name in tensors}


def read_npz(path: Path, fields: Mapping[str, str] | None) -> dict[str, Array]:
    """Read the arrays that `fields` (name -> array name) asks for, or all of them. Raises BackendError("bad data")."""
    try:
        with zipfile.ZipFile(path) as archive:
            there = {entry.filename[:-4]: entry for entry in archive.infolist() if entry.filename.endswith(".npy")}
            fields = {name: name for name in there} if fields is None else fields
            absent = [array for array in fields.values() if array not in there]
            if absent:
                raise _bad(
                    f"{path.name} has no array {', '.join(map(repr, absent))} (it has: {', '.join(sorted(there))})",
                    "map names with `fields`",
                )
            arrays: dict[str, Array] = {}
            budget = MEMORY_LIMIT
            for name, array in fields.items():
                with archive.open(there[array]) as stream:
                    arrays[name] = _read_npy(stream, f"{path.name}: {array}", budget)
                budget -= arrays[name].nbytes
    except _UNREADABLE as err:
        raise _damaged(path.name, err) from err
    return arrays


def read_array_folder(
    folder: Path, fields: Mapping[str, str], ranks: Mapping[str, int], rows: Callable[[int], Array]
) -> dict[str, Array]:
    """Read one sample from each .npy or .npz of a folder, sorted by name; `rows` picks among the files.

    `ranks` are the inputs' ranks with the sample axis: a sample may lack that axis, or have it with extent 1.
    """
    files = _files(folder, frozenset([".npy", ".npz"]))
    chosen = [files[row] for row in rows(len(files))]
    samples: list[dict[str, Array]] = []
    budget = MEMORY_LIMIT
    for file in chosen:
        if file.suffix == ".npz":
            sample = read_npz(file, fields)
        elif len(fields) == 1:
            with file.open("rb") as stream:
                sample = {name: _read_npy(stream, file.name, budget) for name in fields}
        else:
            raise _bad(
                f"{file.name} holds one array, and {', '.join(fields)} are needed",
                "save each sample as .npz with named arrays",
            )
        budget -= sum(array.nbytes for array in sample.values())
        if budget < 0:
            raise _too_large(str(folder.name), MEMORY_LIMIT - budget)
        samples.append({name: _single(array, ranks.get(name), file.name) for name, array in sample.items()})
    return _stack(samples, [file.name for file in chosen])


def read_image_folder(
    folder: Path, spec: Mapping[str, Any], label: str | None, default: str, rows: Callable[[int], Array]
) -> dict[str, Array]:
    """Read images (sorted by path) as NCHW float32, preprocessed as `spec` says; labels are positions of sub-folders.

    `spec` is the recipe's `images` section; its input is `default` where it names none. Labels are int64: the index of
    the first folder of each path among the sorted first folders.
    """
    files = _files(folder, _IMAGE_SUFFIXES)
    chosen = [files[row] for row in rows(len(files))]
    height, width = spec["size"]
    channels = 1 if spec["color"] == "gray" else 3
    size = len(chosen) * channels * height * width * 4
    if size > MEMORY_LIMIT:
        raise _too_large(folder.name, size)
    arrays: dict[str, Array] = {}
    if label is not None:
        flat = [file for file in files if file.parent == folder]
        if flat:
            raise _bad(f"{flat[0].name} lies in no class folder", "put each image into a folder of its class")
        tops = sorted({file.relative_to(folder).parts[0] for file in files})
        arrays[label] = np.array([tops.index(file.relative_to(folder).parts[0]) for file in chosen], np.int64)
    images = np.empty((len(chosen), channels, height, width), np.float32)
    for index, file in enumerate(chosen):
        images[index] = _image(file, spec)
    return {spec["input"] or default: images, **arrays}


def from_callable(returned: Any, fields: Mapping[str, str], limit: int | None) -> dict[str, Array]:
    """Take a dict of arrays (first axis samples), or an iterable of dicts (one sample each, at most `limit` read)."""
    if isinstance(returned, Mapping):
        return {name: _host_array(_field(returned, array), name) for name, array in fields.items()}
    if not isinstance(returned, Iterable) or isinstance(returned, str | bytes):
        raise ModelCodeError(
            f"the data callable returned {type(returned).__name__}; expected a dict of arrays, or an iterable of dicts"
        )
    samples: list[dict[str, Array]] = []
    size = 0
    for sample in returned:
        if limit is not None and len(samples) == limit:
            break
        if not isinstance(sample, Mapping):
            raise ModelCodeError(f"the data callable gave a {type(sample).__name__} as a sample; expected a dict")
        samples.append({name: _host_array(_field(sample, array), name) for name, array in fields.items()})
        size += sum(array.nbytes for array in samples[-1].values())
        if size > MEMORY_LIMIT:
            raise _too_large("what the data callable gives", size)
    if not samples:
        raise _bad("the data callable gave no sample", "check its arguments")
    return _stack(samples, [f"sample {index}" for index in range(len(samples))])


def _field(sample: Mapping[str, Any], name: str) -> Any:
    if name not in sample:
        raise ModelCodeError(
            f"the data callable gave no array {name!r} (it gave: {', '.join(map(str, sample))}); map names with `fields`"
        )
    return sample[name]


def _host_array(value: Any, name: str) -> Array:
    # torch tensors, and lists of numbers, become arrays; objects do not
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.dtype.hasobject or array.dtype.kind not in "biuf":
        raise ModelCodeError(f"the data callable gave {name!r} as {array.dtype}; expected numbers")
    return array


def _read_npy(stream: Any, where: str, budget: int) -> Array:
    """Read one array after comparing its declared size with the budget; no pickles."""
    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except _NO_HEADER as err:
        raise _damaged(where, err) from err
    if dtype.hasobject:
        raise _bad(f"{where} holds Python objects", "save plain numbers; pickles are never loaded")
    if dtype.kind not in "biuf":
        raise _bad(f"{where} holds {dtype}, expected numbers", "save plain numbers")
    if len(shape) > _MOST_AXES or any(type(extent) is not int or extent < 0 for extent in shape):
        raise _bad(f"{where} has shape {shape!s:.100}, which no array has", "save the file again")
    # An array of no elements too must not claim more than there could be.
    size = math.prod(extent or 1 for extent in shape) * dtype.itemsize
    if size > budget:
        raise _too_large(where, size)
    size = math.prod(shape) * dtype.itemsize
    try:
        data = stream.read(size + 1)
    except _UNREADABLE as err:
        raise _damaged(where, err) from err
    if len(data) != size:
        more = "more" if len(data) > size else f"only {len(data)}"
        raise _bad(f"{where} declares {size} bytes of data and has {more}", "save the file again; it may be cut short")
    flat = np.frombuffer(data, dtype)
    array = flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
    return np.array(array, dtype.newbyteorder("="), order="C")


def _files(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file()]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _single(array: Array, rank: int | None, where: str) -> Array:
    if rank is None or array.ndim == rank - 1:
        return array
    if array.ndim == rank and array.shape[0] == 1:
        first: Array = array[0]
        return first
    raise _bad(
        f"{where} has shape {list(array.shape)}, expected one sample of {rank - 1} axes",
        "save one sample in each file, without the batch axis or with a batch of 1",
    )


def _stack(samples: Sequence[Mapping[str, Array]], where: Sequence[str]) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for name in samples[0]:
        first = samples[0][name]
        for sample, place in zip(samples, where, strict=True):
            if sample[name].shape != first.shape or sample[name].dtype != first.dtype:
                raise _bad(
                    f"{place}: {name!r} is {sample[name].dtype} {list(sample[name].shape)}, "
                    f"in {where[0]} {first.dtype} {list(first.shape)}",
                    "give all samples one shape and type",
                )
        arrays[name] = np.stack([sample[name] for sample in samples])
    return arrays


def _image(file: Path, spec: Mapping[str, Any]) -> Array:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow's own limit, made to hold
            with Image.open(file, formats=_IMAGE_FORMATS) as opened:
                mode = "L" if spec["color"] == "gray" else "RGB"
                resized = _resize(ImageOps.exif_transpose(opened).convert(mode), tuple(spec["size"]), spec["resize"])
    except UnidentifiedImageError as err:  # its words hold the path, which differs from run to run
        raise _bad(
            f"{file.name} is not a readable image: its format is not recognised", "remove or replace it"
        ) from err
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as err:
        raise _bad(f"{file.name} is too large an image: {err}", "scale it down") from err
    except Exception as err:  # the decoders of a damaged image raise nearly anything
        raise _bad(f"{file.name} is not a readable image: {err}", "remove or replace it") from err
    pixels = np.asarray(resized, np.float32)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if spec["color"] == "bgr":
        pixels = pixels[::-1]
    mean, std = (_per_channel(spec[key], len(pixels), key) for key in ("mean", "std"))
    normalised: Array = (pixels * np.float32(spec["scale"]) - mean) / std
    return normalised


def _resize(image: Any, size: tuple[int, int], how: str) -> Any:
    from PIL import Image, ImageOps

    height, width = size
    bilinear = Image.Resampling.BILINEAR
    if how == "shorter-side-crop":  # scaled so that it covers, then cut at the centre
        return ImageOps.fit(image, (width, height), bilinear)
    if how == "letterbox":  # scaled so that it fits, then padded with black on both sides
        return ImageOps.pad(image, (width, height), bilinear, color=0)
    return image.resize((width, height), bilinear)


def _per_channel(values: Sequence[float], channels: int, key: str) -> Array:
    if len(values) not in (1, channels):
        raise _bad(f"images.{key} has {len(values)} values for {channels} channels", f"give one, or {channels}")
    return np.broadcast_to(np.array(values, np.float32), channels).reshape(channels, 1, 1)


def _damaged(where: str, error: Exception) -> BackendError:
    return BackendError("bad data", f"{where} cannot be read: {error}", "save the file again; it may be cut short")


def _too_large(where: str, size: int) -> BackendError:
    return _bad(
        f"{where} would take {size / 2**30:.1f} GiB, the limit is {MEMORY_LIMIT >> 30} GiB",
        "take fewer samples, or a smaller set",
    )


def _bad(message: str, advice: str) -> BackendError:
    return BackendError("bad data", message, advice)
