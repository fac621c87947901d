"""One stage at a time on a GPU, for everybody who asks one Prefect server: a global concurrency limit named `gpu:<UUID>`.

The lock on the host (`tasks.gpus`) holds among processes that see one `/tmp`; containers and pods that share a GPU need not. A
slot is leased: Prefect gives it back a minute after its holder was killed. A server that does not answer costs a warning, since
the host's lock holds without it. See docs/adr/0010-gpu-slots.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http import HTTPStatus
from typing import Final

LEASE_SECONDS: Final = 60.0  # the shortest that Prefect takes
_TRY_SECONDS: Final = 10.0  # each refusal is a line in the log of Prefect's client
# A server that keeps leases in memory forgets them when it is restarted, and the slots stay taken (Prefect 3.8).
LOST_SECONDS: Final = 600.0


class GpuSlots:
    """The slots of this host's GPUs; safe to use from several threads."""

    def __init__(self, warn: Callable[[str], None] = lambda _message: None, lost: float = LOST_SECONDS) -> None:
        """`warn` is told what is wrong with the server; a slot that was refused for `lost` seconds counts as forgotten."""
        self._warn = warn
        self._lost = lost
        self._made: set[str] = set()
        self._refused: dict[str, tuple[float, float]] = {}  # since when, and when last

    @contextmanager
    def __call__(self, uuid: str) -> Iterator[bool]:
        """Try to take the slot of a GPU that nobody of this host uses; yield whether a stage may run there."""
        with ExitStack() as lease:
            free = self._take(f"gpu:{uuid}", lease)
            try:
                yield free
            finally:
                try:
                    lease.close()
                except Exception as err:  # noqa: BLE001  of many kinds; the lease ends by itself
                    self._warn(f"the slot gpu:{uuid} could not be given back: {err}")

    def _take(self, name: str, lease: ExitStack) -> bool:
        now = time.monotonic()
        since, last = self._refused.get(name, (now, float("-inf")))
        if now - last < _TRY_SECONDS:
            return False
        from prefect.concurrency.sync import concurrency

        try:
            self._make(name)
            lease.enter_context(
                concurrency(name, max_retries=0, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False)
            )
        except Exception as err:  # noqa: BLE001  whatever the server cannot do, the host's lock does
            if not _is_refusal(err):
                self._warn(f"Prefect gives no slot {name} ({err}); the lock of this host alone keeps others off")
            elif now - since < self._lost:
                self._refused[name] = (since, now)
                return False
            else:
                self._warn(
                    f"the slot {name} was taken for {now - since:.0f} s while nobody of this host used the GPU: freed"
                )
                self._free(name)
        self._refused.pop(name, None)
        return True

    def _make(self, name: str) -> None:
        if name in self._made:
            return
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
        from prefect.exceptions import ObjectAlreadyExists

        with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
        self._made.add(name)

    def _free(self, name: str) -> None:
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate

        try:
            with get_client(sync_client=True) as client:
                client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(active_slots=0))
        except Exception as err:  # noqa: BLE001  of many kinds, and the next one tries again
            self._warn(f"the slot {name} could not be freed: {err}")


def _is_refusal(err: BaseException) -> bool:
    """Tell whether the server said that the slot is taken."""
    response = getattr(err.__cause__, "response", None)
    return getattr(response, "status_code", None) == HTTPStatus.LOCKED
