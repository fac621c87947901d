"""A plan and its inputs, held on the device: what a benchmark runs, and what the layers' times are taken of."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tasks.engines.cuda import Cuda
from tasks.engines.device_arrays import DeviceArray
from tasks.engines.trt_slots import Feed, Slot
from tasks.engines.trt_types import Array


class Bound:
    """Inputs that lie on the device, bound to a plan: runs of it without any copy, with or without a CUDA graph."""

    def __init__(
        self, cuda: Cuda, slot: Slot, feeds: Mapping[str, Array], on_host: Collection[str], where: str, *, graph: bool
    ) -> None:
        """Copy the inputs, but for those that TensorRT reads `on_host`."""
        self._cuda, self._slot, self._where, self._graph = cuda, slot, where, graph
        self.graphed = False
        self._memory = {name: cuda.allocate(feed.nbytes) for name, feed in feeds.items() if name not in on_host}
        bound: dict[str, Feed] = dict(feeds)
        for name, address in self._memory.items():
            feed = feeds[name]
            bound[name] = DeviceArray(address, feed.shape, str(feed.dtype), feed.nbytes, cuda.index, None)
            cuda.upload(address, feed)
        self._outputs = slot.bind(bound, where)
        cuda.synchronize()

    def run(self) -> None:
        """Start one run, in stream order; `graphed` says whether it replayed a graph, which the first ones do not."""
        self.graphed = self._slot.start(self._where, graph=self._graph)

    def synchronize(self) -> None:
        """Wait for every run that was started."""
        self._cuda.synchronize()

    def output(self, name: str, into: Array) -> None:
        """Copy an output whose shape does not depend on data into a contiguous array of the plan's own type."""
        self._cuda.download(into, self._outputs[name].address)
        self._cuda.synchronize()

    def device_ms(self, runs: int) -> list[float]:
        """Return the milliseconds that each of `runs` runs took on the device, by events around it; one at a time."""
        first, last, found = self._cuda.event(), self._cuda.event(), []
        for _ in range(runs):
            self._cuda.record(first)
            self.run()
            self._cuda.record(last)
            self._cuda.synchronize()
            found.append(self._cuda.elapsed_ms(first, last))
        return found

    def layer_ms(self, runs: int) -> dict[str, float]:
        """Return the mean milliseconds of each layer (`Slot.profile`); the plan is of no use for timing after this."""
        return self._slot.profile(self._where, runs)

    def close(self) -> None:
        """Free the inputs; nothing may be run after."""
        for address in self._memory.values():
            self._cuda.free(address)
        self._memory = {}
