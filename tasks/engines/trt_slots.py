"""Execution contexts of a loaded plan, each with its buffers and at most one CUDA graph.

A graph holds what the context was when it was captured: shapes, addresses, and what TensorRT keeps on the host for them.
A context that is changed afterwards makes its graph undefined (developer guide, "CUDA graphs"), so a slot drops its graph
with every change, and shapes that come back often get slots of their own.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tasks.engines.cuda import Cuda
from tasks.engines.device_arrays import DeviceArray
from tasks.engines.trt_log import Log
from tasks.engines.trt_types import DTYPES, Array, type_name
from tasks.errors import BackendError, CallError

# The first runs of a shape must not be captured: TensorRT may still allocate and load in them.
CAPTURE_AFTER: Final = 2
# Smaller tensors go through page-locked memory, so that their copies are a part of the graph; of larger ones the copy into
# that memory would cost more than the driver's own, which overlaps with the transfer.
STAGED_BYTES: Final = 1 << 20
_ALIGNMENT: Final = 256  # of every address that TensorRT takes

Feed = Array | DeviceArray


@dataclass(frozen=True)
class Loaded:
    """A plan that was deserialised: its tensors' types, its outputs in order, and which inputs TensorRT reads on the host.

    `shares_profiles` says whether two contexts may be on one profile.
    """

    trt: Any
    log: Log
    cuda: Cuda
    engine: Any
    kinds: Mapping[str, str]
    outputs: tuple[str, ...]
    on_host: frozenset[str]
    shares_profiles: bool

    def context(self, scratch: int, size: int) -> Any:
        """Return a context that works in `scratch`, which contexts that never run at once may share."""
        bare = getattr(self.engine, "create_execution_context_without_device_memory", None)
        if bare is not None:  # 8.6 and 10
            made = bare()
        else:
            made = self.engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if made is None:
            raise self.log.failure("no execution context", otherwise="out of memory")
        if hasattr(made, "set_device_memory"):  # 10.1 and later
            made.set_device_memory(scratch, size)
        else:
            made.device_memory = scratch
        return made

    def itemsize(self, name: str) -> int:
        """Return the bytes of one element."""
        return np.dtype(DTYPES[self.kinds[name]]).itemsize


class Slot:
    """One execution context on one profile. Buffers grow to the largest that they have held."""

    def __init__(self, loaded: Loaded, context: Any) -> None:
        self.used = 0  # the call that used it last, by the runner's count
        self._loaded, self._context = loaded, context
        self._buffers: dict[str, tuple[int, int]] = {}  # name -> address, size in bytes
        self._staging: dict[str, Array] = {}  # name -> page-locked bytes
        self._values: dict[str, Array] = {}  # inputs that TensorRT reads on the host, kept alive
        self._allocators: dict[str, Any] = {}
        self._key: Any = None
        self._seen = 0
        self._graph: Any = None
        self._capturable = True
        self._forget_arrangement()

    def run(self, feeds: Mapping[str, Feed], out: Mapping[str, Feed], where: str, *, graph: bool) -> dict[str, Any]:
        """Copy in what is on the host, run, copy out, and wait until it is done; the result has what `out` gave in it."""
        cuda = self._loaded.cuda
        key = (*map(_mark, feeds.values()), *((name, _mark(target)) for name, target in out.items()))
        if key != self._key or self._loaded.on_host:
            self._key = None
            self._arrange(feeds, out, where)
            self._key = key
        for name, view in self._staged_in.items():
            np.copyto(view, feeds[name])  # type: ignore[arg-type]  # only what is on the host is staged
        for name in self._plain_in:
            cuda.upload(self._buffers[name][0], feeds[name])  # type: ignore[arg-type]  # as above
        for name in self._unknown:
            self._allocators[name].shape = None
        self._launch(where, graph=graph and self._capturable and not self._unknown and not self._loaded.on_host)
        found: dict[str, Any] = {}
        for name in self._plain_out:
            address, shape = self._result(name, where)
            target = out.get(name)
            found[name] = target if target is not None else np.empty(shape, DTYPES[self._loaded.kinds[name]])
            cuda.download(found[name], address)
        cuda.synchronize()
        for name, view in self._staged_out.items():
            target = out.get(name)
            if target is None:
                found[name] = view.copy()
            else:
                np.copyto(target, view)  # type: ignore[arg-type]  # as above
                found[name] = target
        return {name: found[name] if name in found else out[name] for name in self._loaded.outputs}

    def bind(self, feeds: Mapping[str, Feed], where: str) -> dict[str, DeviceArray]:
        """Set shapes and addresses for `start`, and return where the outputs will be whose shapes do not depend on data."""
        self._key = None
        self._arrange(feeds, {}, where)
        self._plain_out.extend(self._staged_out)  # not even these are copied by `start`
        self._staged_out.clear()
        kinds = self._loaded.kinds
        return {
            name: DeviceArray(
                self._buffers[name][0],
                shape,
                type_name(kinds[name]),
                math.prod(shape) * self._loaded.itemsize(name),
                self._loaded.cuda.index,
                self,
            )
            for name, shape in self._shapes.items()
        }

    def start(self, where: str, *, graph: bool) -> bool:
        """Start one run on what is bound, without waiting for it; return whether it replayed a graph."""
        for name in self._unknown:
            self._allocators[name].shape = None
        self._launch(where, graph=graph and self._capturable and not self._unknown and not self._loaded.on_host)
        return self._graph is not None

    def profile(self, where: str, runs: int) -> dict[str, float]:
        """Return the mean milliseconds of each layer over `runs` runs on what is bound, in order of execution.

        TensorRT's own profiler tells them; it stays attached and slows every later run. A CUDA graph cannot be profiled.
        Names that two layers share are told apart by ` #2`.
        """
        profiler = _profiler(self._loaded.trt)
        self._context.profiler = profiler
        for _ in range(runs):
            self.start(where, graph=False)
            self._loaded.cuda.synchronize()
            profiler.end_run()
        return {name: sum(times) / len(times) for name, times in profiler.times.items()}

    def close(self) -> None:
        """Free graph, context and buffers; nothing may be running."""
        try:
            self._drop_graph()
        finally:
            self._context = None
        for address, _size in self._buffers.values():
            self._loaded.cuda.free(address)
        for name in list(self._staging):
            self._loaded.cuda.free_pinned(self._staging.pop(name))
        self._buffers, self._allocators = {}, {}

    def _forget_arrangement(self) -> None:
        self._unknown: list[str] = []  # outputs whose shape depends on data
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._staged_in: dict[str, Array] = {}
        self._staged_out: dict[str, Array] = {}
        self._plain_in: list[str] = []
        self._plain_out: list[str] = []
        self._copies: list[tuple[int, int, int]] = []  # before the run: to, from, bytes
        self._returns: list[tuple[int, int, int]] = []  # after it

    def _arrange(self, feeds: Mapping[str, Feed], out: Mapping[str, Feed], where: str) -> None:
        """Set shapes and addresses, and decide how each tensor travels."""
        self._drop_graph()
        self._forget_arrangement()
        self._seen = 0
        for name, feed in feeds.items():
            self._arrange_input(name, feed, where)
        for name in self._loaded.outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            if -1 in shape or name in self._allocators:  # after a run, 8.6 tells the shape that it gave
                self._arrange_unknown(name, out, where)
            else:
                self._shapes[name] = shape
                self._arrange_output(name, shape, out.get(name), where)

    def _arrange_input(self, name: str, feed: Feed, where: str) -> None:
        before = len(self._loaded.log.errors)
        if not self._context.set_input_shape(name, tuple(feed.shape)):
            said = "; ".join(self._loaded.log.take_errors(before))
            raise BackendError("bad profile", f"{where}: input {name} {list(feed.shape)}: {said}", "widen a profile")
        if name in self._loaded.on_host:
            if isinstance(feed, DeviceArray):
                raise CallError(f"{where}: TensorRT reads the input {name} on the host; give it there")
            self._values[name] = feed
            self._bind(name, feed.ctypes.data)
        elif isinstance(feed, DeviceArray):
            if feed.address % _ALIGNMENT == 0:
                self._bind(name, feed.address)
            else:
                self._copies.append((self._reserve(name, feed.nbytes), feed.address, feed.nbytes))
        else:
            self._reserve(name, feed.nbytes)
            if feed.nbytes <= STAGED_BYTES:
                self._staged_in[name] = self._stage(name, feed.shape)
            else:
                self._plain_in.append(name)

    def _arrange_output(self, name: str, shape: tuple[int, ...], target: Feed | None, where: str) -> None:
        if target is not None and (found := tuple(target.shape)) != shape:
            raise CallError(
                f"{where}: the output {name} is {list(shape)} at these inputs, `out` has {list(found)} for it"
            )
        size = math.prod(shape) * self._loaded.itemsize(name)
        if isinstance(target, DeviceArray):
            if target.address % _ALIGNMENT == 0:
                self._bind(name, target.address)
            else:
                self._returns.append((target.address, self._reserve(name, size), size))
            return
        self._reserve(name, size)
        if size <= STAGED_BYTES:
            self._staged_out[name] = self._stage(name, shape)
        else:
            self._plain_out.append(name)

    def _arrange_unknown(self, name: str, out: Mapping[str, Feed], where: str) -> None:
        if name in out:
            raise CallError(
                f"{where}: the shape of the output {name} depends on the data, so `out` cannot have room for it"
            )
        self._unknown.append(name)
        self._plain_out.append(name)
        if name not in self._allocators:
            # With room for the most there can be, so that growing is the exception.
            address = self._reserve(name, self._context.get_max_output_size(name))
            self._allocators[name] = _allocator(self._loaded.trt, self._loaded.cuda, address, self._buffers[name][1])
            if not self._context.set_output_allocator(name, self._allocators[name]):
                raise self._loaded.log.failure(f"TensorRT does not take an allocator for {name}")

    def _result(self, name: str, where: str) -> tuple[int, tuple[int, ...]]:
        if name not in self._unknown:
            return self._buffers[name][0], self._shapes[name]
        if self._allocators[name].shape is None:
            raise self._loaded.log.failure(f"{where}: TensorRT does not tell the shape of output {name}")
        return self._allocators[name].address, self._allocators[name].shape

    def _launch(self, where: str, *, graph: bool) -> None:
        cuda = self._loaded.cuda
        if graph and self._graph is None and self._seen >= CAPTURE_AFTER:
            self._capture(where)
        if graph and self._graph is not None:
            cuda.launch(self._graph)
            return
        self._work(where)
        self._seen += 1

    def _capture(self, where: str) -> None:
        """Record one run as a graph; what cannot be recorded (some layers synchronise) is run without one from here on."""
        log, before = self._loaded.log, len(self._loaded.log.errors)
        self._loaded.cuda.begin_capture()
        try:
            self._work(where)
            self._graph = self._loaded.cuda.end_capture()
        except BackendError as err:
            with contextlib.suppress(BackendError):  # leave the stream usable
                self._loaded.cuda.end_capture()
            self._capturable = False
            log.take_errors(before)
            log.warnings.append(f"no CUDA graph: {err.message}")

    def _work(self, where: str) -> None:
        cuda, log = self._loaded.cuda, self._loaded.log
        for name, view in self._staged_in.items():
            cuda.upload(self._buffers[name][0], view)
        for target, source, size in self._copies:
            cuda.copy(target, source, size)
        before = len(log.errors)
        if not self._context.execute_async_v3(cuda.stream) or log.errors[before:]:
            raise log.failure(f"{where}: TensorRT does not run the plan", since=before)
        for target, source, size in self._returns:
            cuda.copy(target, source, size)
        for name, view in self._staged_out.items():
            cuda.download(view, self._buffers[name][0])

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._loaded.cuda.drop(self._graph)
            self._graph = None

    def _stage(self, name: str, shape: Sequence[int]) -> Array:
        """Return a page-locked array of a tensor's type and this shape."""
        dtype = np.dtype(DTYPES[self._loaded.kinds[name]])
        size = math.prod(shape) * dtype.itemsize
        held = self._staging.get(name)
        if held is None or held.nbytes < size:
            if held is not None:
                self._loaded.cuda.free_pinned(self._staging.pop(name))
            held = self._staging[name] = self._loaded.cuda.pinned(size)
        view: Array = held[:size].view(dtype).reshape(shape)
        return view

    def _reserve(self, name: str, size: int) -> int:
        address, had = self._buffers.get(name, (0, -1))
        if had < size:
            if had >= 0:
                del self._buffers[name]
                self._loaded.cuda.free(address)
            address = self._loaded.cuda.allocate(size)
            self._buffers[name] = (address, size)
        self._bind(name, address)
        return address

    def _bind(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise self._loaded.log.failure(f"TensorRT does not take an address for {name}")


def _mark(value: Feed) -> Any:
    """Return what a captured graph depends on: of what is on the device, also where it is."""
    return (value.shape, value.address) if isinstance(value, DeviceArray) else value.shape


def _profiler(trt: Any) -> Any:
    """Return an IProfiler that gathers milliseconds by layer; `end_run` ends a run, so that names repeat."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]  # its type is known only at run time
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, list[float]] = {}
            self._seen: Counter[str] = Counter()

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self._seen[layer_name] += 1
            count = self._seen[layer_name]
            self.times.setdefault(layer_name if count == 1 else f"{layer_name} #{count}", []).append(ms)

        def end_run(self) -> None:
            self._seen.clear()

    return Profiler()


def _allocator(trt: Any, cuda: Cuda, address: int, size: int) -> Any:
    """Return an IOutputAllocator, with memory to start with, for an output whose shape depends on data."""

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]  # its type is known only at run time
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.address, self.size = address, size
            self.shape: tuple[int, ...] | None = None

        def reallocate_output(self, _name: str, _memory: int, size: int, _alignment: int) -> int:
            return self._grow(size)

        def reallocate_output_async(self, _name: str, _memory: int, size: int, _alignment: int, _stream: int) -> int:
            return self._grow(size)

        def notify_shape(self, _name: str, shape: Any) -> None:
            self.shape = tuple(shape)

        def _grow(self, size: int) -> int:
            if size > self.size:  # the old memory stays until `close`: the context still names it
                self.address, self.size = cuda.allocate(size), size
            return self.address

    return Allocator()
