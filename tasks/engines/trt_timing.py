"""TensorRT's timing cache: what kernels took on this device, given to a build and taken from it.

A cache is of one TensorRT version and one kind of device; a mismatch is never ignored: such a cache "may lead to functional or
performance bugs" (ITimingCache.combine). Of a cache that 8.6 wrote itself it does not read the graph compiler's part ("Myelin
error from unknown graph"; KataGo's issues 739 and 945 report it of 8.5 and 8.6, mended in 10.2), and says that the cache will not
be used; what kernels took it has read before that ("Loaded 622 timing cache entries"), and uses: see docs/tensorrt.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from artifacts.refs import BYTES
from tasks.engines.trt_log import Log
from tasks.engines.trt_replay import is_editable, pin_tactics, require_same_tactics, tactic_table
from tasks.errors import BackendError
from tasks.stage import StageRequest, StageResult

TIMING_CACHE: Final = "timing.cache"
_OTHER: Final = "made by another version or on another device"
# 8.6 says as an error that it does not use a cache; TensorRT-RTX 1.7, whose code is that of 10 and 11, as a warning, and goes
# on with an empty one. (Strings of the libraries; seen with both.)
_REFUSED: Final = re.compile(
    r"timing cache will not be used|deserialize timing cache|incoming (cache|ITimingCache)|Timing cache header mismatch"
)
# What 8.6 says where it has read the timings of kernels, and nothing of the graph compiler's: its advice is of that part alone.
_WITHOUT_MYELIN: Final = re.compile(r"myelinCache\.h.*deserializeFromBuffer")
_ADVICE_OF_8: Final = re.compile(r"timing cache will not be used")


class TimingCache:
    """The timing cache of one build: the one that was given, or an empty one.

    `facts`: given; used, or what was said when it was `refused`; without, what was said of a part that is not used; size_before
    and size_after in bytes; reloads, whether what is kept loads again; and of a reproducible build with an editable cache,
    tactics: how many the table holds.
    """

    def __init__(self, trt: Any, log: Log, given: Path | None) -> None:
        self._trt, self._log = trt, log
        self._table: dict[str, str] | None = None
        # Kept: nothing says that TensorRT copies the bytes.
        self._data = given.read_bytes() if given is not None else None
        self.facts: dict[str, Any] = {"given": given is not None, "used": False}
        if self._data is not None:
            self.facts["size_before"] = len(self._data)

    def attach(self, config: Any, params: Mapping[str, Any]) -> Any:
        """Give the cache to a builder configuration, and return it: it has to live until the build is done.

        params: optimization_level, at 0 of which the builder takes none ("should not be enabled in fastBuild mode", 8.6); and,
        where given, timing_cache ("pinned": it is used or the build fails) and reproducible (what it holds is replayed; the
        flags of that have been set). Raises BackendError("version mismatch" | "not reproducible").
        """
        if params.get("optimization_level") == 0:
            self.facts["refused"] = "optimisation level 0 takes no timing cache"
            return None
        if self._data is not None:
            cache, attempt = self._set(config, self._data)
            refused = attempt.refused
            if refused is None:
                self.facts |= {"used": True, **attempt.facts}
                if params.get("reproducible") and is_editable(self._trt):
                    self._table = pin_tactics(cache)
                    self.facts["tactics"] = len(self._table)
                return cache
            if params.get("timing_cache") == "pinned":
                raise BackendError(
                    "version mismatch",
                    f"TensorRT {self._trt.__version__} does not take the pinned timing cache: {refused}",
                    "pin one that this version wrote on such a device, or leave build.timing_cache out",
                )
            self.facts["refused"], self._data = refused, None
            self._log.warnings.append(f"the timing cache is not used: {refused}")
        return self._set(config, b"")[0]

    def keep(self, config: Any, folder: Path) -> None:
        """Write what was given and what this build measured, and find out whether it loads again.

        Raises BackendError("not reproducible") where the table of tactics that was to be replayed has changed.
        """
        cache = config.get_timing_cache()
        if self._table is not None:
            require_same_tactics(self._table, tactic_table(cache))
        data = cache.serialize() if cache is not None else None
        if data is None:
            return
        written = bytes(memoryview(data))
        refused = _attempt(self._log, lambda: config.create_timing_cache(written) is not None).refused
        self.facts |= {"size_after": len(written), "reloads": refused is None}
        if refused is not None:
            self.facts["reload_refused"] = refused
        (folder / TIMING_CACHE).write_bytes(written)

    def _set(self, config: Any, data: bytes) -> tuple[Any, _Attempt]:
        """Return a cache of these bytes that the configuration uses from now on, and what came of it."""
        cache = None

        def take() -> bool:
            nonlocal cache
            cache = config.create_timing_cache(data)
            return cache is not None and config.set_timing_cache(cache, False)

        attempt = _attempt(self._log, take)
        return cache, attempt


def merge(request: StageRequest) -> StageResult:
    """Merge the inputs "base.cache" and "more.cache" to "timing.cache"; where both know something, the base is believed.

    Facts: refused, what TensorRT said where the two are not of one version and device; then there is no output.
    """
    import tensorrt as trt

    refused = merge_with(trt, request.inputs["base.cache"], request.inputs["more.cache"], request.output_dir)
    return StageResult({TIMING_CACHE: BYTES} if refused is None else {}, {"refused": refused})


def merge_with(trt: Any, base: Path, more: Path, folder: Path) -> str | None:
    """Merge two cache files with one TensorRT module into "timing.cache" in a folder; return why not, or None.

    8.6 merges what kernels took, says no because of the graph compiler's part, and nothing else: that is a merge too.
    Raises BackendError("no device") where TensorRT does not start.
    """
    log = Log(lambda _fraction, _text: None)
    logger = log.for_runtime(trt)
    try:
        config = trt.Builder(logger).create_builder_config()
    except TypeError as err:  # "pybind11::init(): factory function returned nullptr"
        raise log.failure(f"TensorRT {trt.__version__} does not start", otherwise="no device") from err
    data, caches = [base.read_bytes(), more.read_bytes()], list[Any]()

    def create() -> bool:
        caches.extend(config.create_timing_cache(one) for one in data)
        return None not in caches

    refused = _attempt(log, create).refused
    if refused is None:
        refused = _attempt(log, lambda: bool(caches[0].combine(caches[1], False)), takes_without=True).refused
    if refused is not None:
        return refused
    merged = caches[0].serialize()
    if merged is None:
        raise BackendError("crash", "TensorRT does not serialise the merged timing cache", "please report it")
    (folder / TIMING_CACHE).write_bytes(memoryview(merged))
    return None


@dataclass(frozen=True)
class _Attempt:
    """What came of an attempt to use a cache: why it was refused, or what was said of a part that is not used; None: nothing."""

    refused: str | None
    without: str | None = None

    @property
    def facts(self) -> dict[str, str]:
        return {"without": self.without} if self.without is not None else {}


def _attempt(log: Log, attempt: Callable[[], bool], *, takes_without: bool = False) -> _Attempt:
    """Try to use a cache; what is logged of that is taken out of the log.

    takes_without: an answer of no counts for nothing where all that is said is of the graph compiler's part.
    """
    errors, warnings = len(log.errors), len(log.warnings)
    done = attempt()
    new = log.warnings[warnings:]
    log.warnings[warnings:] = [words for words in new if not _REFUSED.search(words)]
    said = [*log.take_errors(errors), *(words for words in new if _REFUSED.search(words))]
    without = [words for words in said if _WITHOUT_MYELIN.search(words)]
    of_that_alone = all(_WITHOUT_MYELIN.search(words) or _ADVICE_OF_8.search(words) for words in said)
    if without and of_that_alone and (done or takes_without):
        return _Attempt(None, without[0])
    return _Attempt("; ".join(said) or (None if done else _OTHER))
