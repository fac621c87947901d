"""A device whose memory is the host's, and a plan that doubles its input: what runs contexts can be driven without a GPU.

It holds to the rules that CUDA and TensorRT state and do not check: memory that was freed is not used, addresses are
aligned, a graph is not replayed after its context was changed, and contexts that cannot share a profile (8.6, where asking
ends the process) are not asked to. Breaking one is an AssertionError.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from types import SimpleNamespace

import numpy as np

from tasks.engines.device_arrays import DeviceArray
from tasks.engines.trt_log import Log
from tasks.engines.trt_slots import Loaded
from tasks.errors import BackendError

ALIGNMENT = 256


class HostCuda:
    """Stands in for tasks.engines.cuda.Cuda: work is done as it is put into the stream, or recorded."""

    index, stream = 0, 7

    def __init__(self):
        self.memory, self.locked, self.graphs = {}, {}, set()
        self.recording, self.capturable, self.fault = None, True, ""
        self.launches = self.captures = self.work = 0

    def allocate(self, size):
        memory = np.full(max(size, 1) + ALIGNMENT, 0xAA, np.uint8)
        address = -(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.memory[address] = memory
        return address

    def free(self, address):
        self.memory.pop(address)[:] = 0xFF

    def pinned(self, size):
        memory = np.full(max(size, 1), 0xAA, np.uint8)
        self.locked[memory.ctypes.data] = memory
        return memory

    def free_pinned(self, memory):
        self.locked.pop(memory.ctypes.data)[:] = 0xFF

    def holds(self, address, size):
        return any(
            memory.ctypes.data <= address and address + size <= memory.ctypes.data + memory.nbytes
            for memory in (*self.memory.values(), *self.locked.values())
        )

    def do(self, work):
        if self.recording is not None:
            self.recording.append(work)
        else:
            work()

    def upload(self, address, array):
        self._move(address, array.ctypes.data, array.nbytes, host=array)

    def download(self, array, address):
        self._move(array.ctypes.data, address, array.nbytes, host=array)

    def copy(self, target, source, size):
        self._move(target, source, size)

    def synchronize(self):
        assert self.recording is None
        if self.fault:
            raise BackendError("crash", self.fault)

    def begin_capture(self):
        self.captures += 1
        self.recording = []

    def end_capture(self):
        recorded, self.recording = self.recording, None
        if not self.capturable:
            raise BackendError("crash", "cuStreamEndCapture: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        graph = tuple(recorded)
        self.graphs.add(graph)
        return graph

    def launch(self, graph):
        assert graph in self.graphs
        self.launches += 1
        for work in graph:
            work()

    def drop(self, graph):
        self.graphs.remove(graph)

    def event(self):
        return [None]

    def record(self, event):
        self.work += 1
        event[0] = self.work

    def elapsed_ms(self, first, last):
        return float(last[0] - first[0])

    def _move(self, target, source, size, host=None):
        if self.recording is not None and host is not None:
            assert self.holds(host.ctypes.data, host.nbytes), "a graph copies from or to memory that is not page-locked"

        def work():
            for address in (target, source):
                own = host is not None and address == host.ctypes.data
                assert own or self.holds(address, size), "memory that is not allocated"
            ctypes.memmove(target, source, size)

        self.do(work)


class Context:
    """Doubles x into y; with `selects`, y has only what is positive, and its shape is known after the run."""

    def __init__(self, plan):
        self.plan, self.engine = plan, plan.engine
        self.profile = None
        self.shape, self.addresses, self.allocator, self.changes, self.scratch = None, {}, None, 0, None
        self.given = (-1,)  # the shape that y had in the last run, where it depends on data: 8.6 tells it from then on
        if all(context.profile != 0 for context in plan.contexts):
            self.profile = 0
        plan.contexts.add(self)

    def set_device_memory(self, address, size):
        self.scratch = address, size

    def set_optimization_profile_async(self, profile, stream):
        assert stream == HostCuda.stream
        others = [context for context in self.plan.contexts if context is not self]
        assert self.plan.shares or all(context.profile != profile for context in others), "a crash of 8.6"
        if self.plan.refuses:
            self.plan.log.write("ERROR", self.plan.refuses)
            raise RuntimeError("Error in set optimization profile async.")
        self.profile = profile
        return True

    def set_input_shape(self, name, shape):
        assert name == "x"
        assert self.profile is not None
        low, high = self.plan.profiles[self.profile]
        if not low <= shape[0] <= high:
            self.plan.log.write("ERROR", "out of the profile")
            return False
        self.changes += 1
        self.shape = shape
        return True

    def set_tensor_address(self, name, address):
        self.changes += 1
        self.addresses[name] = address
        return address % ALIGNMENT == 0

    def set_output_allocator(self, name, allocator):
        assert name == "y"
        self.allocator = allocator
        return True

    def get_tensor_shape(self, name):
        return self.given if name == "y" and self.plan.selects else self.shape

    def get_max_output_size(self, name):
        return 64 if name == "y" else 0

    def execute_async_v3(self, stream):
        assert stream == HostCuda.stream
        if self.plan.cuda.recording is not None and not self.plan.cuda.capturable:
            self.plan.log.write("ERROR", "operation not permitted when stream is capturing")
            return False
        if self.plan.fails:
            self.plan.log.write("ERROR", self.plan.fails)
            return False
        cuda, changes = self.plan.cuda, self.changes
        shape, source, target = self.shape, self.addresses["x"], self.addresses.get("y")
        size = 4 * math.prod(shape)

        def work():
            assert self.changes == changes, "the context was changed since it was captured"
            assert cuda.holds(source, size)
            assert cuda.holds(self.scratch[0], self.scratch[1])
            found = 2 * self._at(source, shape)
            if self.plan.selects:
                found = found[found > 0].ravel()
                address = self.allocator.reallocate_output("y", target, found.nbytes, 256)
                self.allocator.notify_shape("y", found.shape)
                self.given = found.shape
            else:
                address = target
            assert cuda.holds(address, found.nbytes)
            self._at(address, found.shape)[...] = found

        cuda.do(work)
        self.plan.runs += cuda.recording is None
        return True

    @staticmethod
    def _at(address, shape):
        return np.ctypeslib.as_array((ctypes.c_float * math.prod(shape)).from_address(address)).reshape(shape)


class HostPlan:
    """A loaded plan on a HostCuda: `profiles` are the least and largest batch of each; `shares` says whether contexts may."""

    def __init__(self, profiles=((1, 64),), *, shares=True, selects=False):
        self.profiles, self.shares, self.selects = profiles, shares, selects
        self.cuda, self.log = HostCuda(), Log(lambda *_said: None)
        self.contexts, self.runs = weakref.WeakSet(), 0  # a context goes with its last name
        self.fails = self.refuses = ""  # what TensorRT says when it does not run, or does not take a profile
        self.engine = SimpleNamespace(
            num_optimization_profiles=len(profiles),
            device_memory_size_v2=512,
            create_execution_context_without_device_memory=lambda: Context(self),
        )
        trt = SimpleNamespace(IOutputAllocator=type("IOutputAllocator", (), {"__init__": lambda _self: None}))
        kinds = {"x": "FLOAT", "y": "FLOAT"}
        self.loaded = Loaded(trt, self.log, self.cuda, self.engine, kinds, ("y",), frozenset(), shares)

    def device_array(self, values, offset=0):
        """Put values into device memory, `offset` bytes after an aligned address."""
        address = self.cuda.allocate(values.nbytes + offset) + offset
        ctypes.memmove(address, values.ctypes.data, values.nbytes)
        return DeviceArray(address, values.shape, values.dtype.name, values.nbytes, 0, None)

    def read(self, array):
        """Return what a device array holds."""
        found = np.empty(array.shape, array.dtype)
        ctypes.memmove(found.ctypes.data, array.address, found.nbytes)
        return found
