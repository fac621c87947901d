"""One GPU for one stage: no two builds or benchmarks of this host share one, whichever store, user or process they are of.

A compiler times kernels, and a benchmark times engines: what else runs on the device would be in their figures. Each GPU (and
each MIG slice) has a lock, which the kernel drops with its holder; on a worker it has a slot on the Prefect server too. A GPU that others use, who know nothing of these locks, is
taken only where no other is free.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, Protocol

from artifacts.host import Gpu
from tasks.devices import VISIBLE, busy_gpus
from tasks.errors import BackendError, StageCancelledError
from tasks.toolchain import probe_host

# Not under TMPDIR, which differs between the users and jobs of one host.
LOCKS: Final = Path("/tmp")  # noqa: S108 - the files hold nothing, and a lock is one for the whole host or it is none
_LOOK_SECONDS: Final = 0.25
# Tries to take a GPU for a block, from those who share it and not this host's locks (`tasks.gpu_slots`); yields whether it did.
Slot = Callable[[str], AbstractContextManager[bool]]


class Busy(Protocol):
    """Says which of these GPUs somebody uses."""

    def __call__(self, uuids: Sequence[str]) -> Collection[str]:
        """Return those of `uuids` that are in use."""


def no_slot(_uuid: str) -> AbstractContextManager[bool]:
    """Ask nobody."""
    return nullcontext(enter_result=True)


def needs_gpu(params: Mapping[str, Any]) -> bool:
    """Tell whether a stage with these parameters runs on a GPU of this host: one that looks at an opset alone does not."""
    if params.get("by") == "opset":
        return False
    return params.get("runtime") == "tensorrt" or params.get("executor") in ("tensorrt", "tensorrt-rtx")


@contextmanager
def gpu_held(
    params: Mapping[str, Any],
    device: Mapping[str, Any] | None = None,
    *,
    gpus: Sequence[Gpu] | None = None,
    waits: Callable[[], None] = lambda: None,
    give_up: Callable[[], bool] = lambda: False,
    slot: Slot | None = None,
) -> Iterator[Gpu | None]:
    """Hold a GPU for a stage that needs one, and yield it (None where none is needed); its process is to see that alone.

    It is one of params["gpu"] (a compute capability; a stage that names none, as a parser's question, takes any) and, where
    `device` says what it must be like (`Gpu.device`), one that is. `gpus` are those of this host, None: ask. `waits` is called once where all are held by others. Raises
    BackendError("no device") where there is no such GPU, StageCancelledError when `give_up` says True while waiting.
    """
    if not needs_gpu(params):
        yield None
        return
    there = probe_host().gpus if gpus is None else gpus
    fitting = {
        gpu.uuid: gpu
        for gpu in there
        if params.get("gpu") in (None, gpu.compute_capability) and (device is None or gpu.device() == device)
    }
    if not fitting:
        here = ", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in there) or "none"
        wanted = params.get("gpu", "NVIDIA") if device is None else f"{device['name']} ({params['gpu']}, as planned)"
        advice = "use a host with an NVIDIA GPU and its driver; `enginery doctor` says what is missing"
        raise BackendError("no device", f"no {wanted} GPU is here (found: {here})", advice)
    with held(list(fitting), busy=busy_gpus, waits=waits, give_up=give_up, slot=slot) as uuid:
        yield fitting[uuid]


def visible(gpu: Gpu | None) -> dict[str, str]:
    """Return the variables that show a process this GPU alone; none where it needs none."""
    return {VISIBLE: gpu.uuid} if gpu is not None else {}


@contextmanager
def held(
    uuids: Sequence[str],
    *,
    busy: Busy,
    waits: Callable[[], None],
    give_up: Callable[[], bool],
    folder: Path = LOCKS,
    slot: Slot | None = None,
) -> Iterator[str]:
    """Hold one of these GPUs, and yield its UUID: an idle one if there is, else the first that frees.

    Raises StageCancelledError when `give_up` says True, BackendError("no device") where no lock can be had at all.
    """
    from filelock import FileLock, Timeout

    # Old drivers name MIG slices by a path.
    locks = {uuid: FileLock(folder / f"enginery-{uuid.replace('/', '_')}.lock", mode=0o666) for uuid in uuids}
    waited = False
    while True:
        for uuid in sorted(uuids, key=frozenset(busy(uuids)).__contains__):  # stable: in order, the idle ones first
            try:
                locks[uuid].acquire(blocking=False)
            except Timeout:
                continue
            except OSError as err:  # which Timeout is too
                advice = f"make {folder} writable: its lock files keep two stages of this host off one GPU"
                raise BackendError("no device", f"the GPU {uuid} cannot be locked: {err}", advice) from err
            try:
                with (slot or no_slot)(uuid) as taken:
                    if taken:
                        yield uuid
                        return
            finally:
                locks[uuid].release()
        if not waited:
            waits()
            waited = True
        if give_up():
            raise StageCancelledError("cancelled while waiting for a GPU")
        time.sleep(_LOOK_SECONDS)
