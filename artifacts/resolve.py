"""Which engine may a host load, and which of those is best: pure rules over manifests.

An engine is refused with a reason for each rule that it breaks. Among those that fit, in this order:
on a GPU before on the CPU; of the newest source (code, weights) of those; the fastest that was measured on this device
(by name: "NVIDIA L4"), before those that were not; executed before not executed; asked for in the precision that the newest recipe
wants most; newest; by name. What is within `AS_FAST` of the fastest is as fast: measures of one engine differ by as much.
A fallback is offered only where no engine fits. It needs neither the system that published it nor the very version of
what runs it: that one, or a later one; of an exported program of PyTorch's, which promises nothing between releases, a later
one of the same release (2.13).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from artifacts.host import DEVICE_FACTS, Gpu, Host
from artifacts.manifest import EXPORTED_PROGRAM, Compatibility, FallbackFacts, Manifest, Profile
from artifacts.manifest_benchmark import BenchmarkFacts
from artifacts.timings import mean_ms

CPU = "cpu"
AS_FAST: Final = 0.05


@dataclass(frozen=True)
class Request:
    """What is to load an engine.

    `runtimes` maps each runtime that is there to its full version; `gpus` holds compute capabilities (`sm89`), and
    `cpu` where engines for the CPU are welcome; `shapes` maps inputs to the sizes that one profile must cover (an
    input that is not named may have any); `channel` is a channel's name, whose builds `resolve` is given. `devices` are
    the GPUs themselves, where they are known: engines that are bound to the device they were built on are compared with
    those; without any they are offered by compute capability alone. `frameworks` run source models: torch, paddle.
    """

    runtimes: Mapping[str, str]
    gpus: Sequence[str]
    os: str
    arch: str
    driver: str | None = None
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    channel: str | None = None
    precision: str | None = None
    devices: Sequence[Gpu] = ()
    frameworks: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_host(
        cls,
        host: Host,
        *,
        shapes: Mapping[str, Sequence[int]] | None = None,
        channel: str | None = None,
        precision: str | None = None,
    ) -> Request:
        """Ask for what a host may load: any of its runtimes, on any of its GPUs or its CPU."""
        gpus = (*dict.fromkeys(gpu.compute_capability for gpu in host.gpus), CPU)
        return cls(
            host.runtimes,
            gpus,
            host.os,
            host.arch,
            host.driver,
            shapes or {},
            channel,
            precision,
            host.gpus,
            host.frameworks,
        )


@dataclass(frozen=True)
class Candidate:
    """One engine, and why it may not be loaded; without reasons it may."""

    manifest: Manifest
    reasons: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the engine may be loaded."""
        return not self.reasons


@dataclass(frozen=True)
class Resolution:
    """The best engine, or None; and every candidate: those that fit best first, then the refused by name."""

    best: Manifest | None
    candidates: tuple[Candidate, ...]


def resolve(
    manifests: Iterable[Manifest],
    request: Request,
    channels: Mapping[str, str] | None = None,
    *,
    distrust: Callable[[Manifest], Sequence[str]] = lambda _manifest: (),
) -> Resolution:
    """Choose an engine; the answer does not depend on the order of `manifests`.

    `channels` maps targets to the build that the request's channel names for them. `distrust` returns reasons not to
    believe a manifest, and is asked only about those that break no rule: what it refuses has no part in the choice.
    """
    found = sorted(manifests, key=lambda manifest: str(manifest.identity))
    judged = [
        Candidate(manifest, refusals(manifest, request, channels or {}) or tuple(distrust(manifest)))
        for manifest in found
    ]
    possible = [candidate.manifest for candidate in judged if candidate.fits]
    refused = [candidate for candidate in judged if not candidate.fits]
    engines = [manifest for manifest in possible if manifest.fallback is None]
    if engines:
        spare = "is a fallback, and an engine fits"
        refused += [Candidate(manifest, (spare,)) for manifest in possible if manifest.fallback is not None]
        refused.sort(key=lambda candidate: str(candidate.manifest.identity))
    fitting = _ranked(engines or possible, request)
    return Resolution(
        best=fitting[0] if fitting else None,
        candidates=(*(Candidate(manifest, ()) for manifest in fitting), *refused),
    )


def refusals(manifest: Manifest, request: Request, channels: Mapping[str, str]) -> tuple[str, ...]:
    """Return every rule that forbids an engine to whoever asks, in words; empty where it may be loaded."""
    needs, reasons = manifest.compatibility, []
    version = request.runtimes.get(needs.runtime)
    if version is None and manifest.fallback is not None:
        version = request.frameworks.get(needs.runtime)
    if version is None:
        there = ", ".join(sorted(request.runtimes)) or "no runtime"
        reasons.append(f"needs {needs.runtime}; there is {there}")
    elif version != needs.runtime_version and not (
        manifest.fallback is not None and _reads(manifest.fallback, version, needs.runtime_version)
    ):
        reasons.append(f"needs {needs.runtime} {needs.runtime_version}; there is {version}")
    if not set(needs.gpus) & set(request.gpus):
        reasons.append(f"is for {' or '.join(needs.gpus)}; there is {', '.join(request.gpus) or 'no GPU'}")
    elif needs.device is not None and request.devices:
        reasons.extend(_device_refusals(needs, request.devices))
    # TensorRT plans are bound to system and architecture. NVIDIA states TensorRT-RTX plans to be independent of the
    # system (facts: tensorrt.md section 5), which was never tried here, so it is not relied on.
    if manifest.fallback is None and (needs.os, needs.arch) != (request.os, request.arch):
        reasons.append(f"is for {needs.os} {needs.arch}; there is {request.os} {request.arch}")
    if needs.driver_minimum is not None and not _at_least(request.driver, needs.driver_minimum):
        reasons.append(f"needs driver {needs.driver_minimum}; there is {request.driver or 'none known'}")
    if not manifest.verification.passed:
        reasons.append("its gates did not pass")
    if request.precision not in (None, manifest.precision.given):
        reasons.append(f"is {manifest.precision.given}, not {request.precision}")
    if request.channel is not None and channels.get(manifest.identity.target) != manifest.identity.build:
        named = channels.get(manifest.identity.target, "nothing for this target")
        reasons.append(f"channel {request.channel} names {named}")
    reasons.extend(_shape_refusals(manifest, request.shapes))
    return tuple(reasons)


def _device_refusals(needs: Compatibility, devices: Sequence[Gpu]) -> list[str]:
    """Say in what every GPU of the compute capability differs from the one that the engine was built on.

    What either side does not know is not compared.
    """
    built_on, differences = needs.device, list[str]()
    for gpu in devices:
        if gpu.compute_capability in needs.gpus:
            pairs = [(name, getattr(built_on, name), getattr(gpu, name)) for name in DEVICE_FACTS]
            unequal = [
                f"{name} {old} and not {new}" for name, old, new in pairs if None not in (old, new) and old != new
            ]
            if not unequal:
                return []
            differences.append(f"was built on a GPU with {', '.join(unequal)} ({gpu.name} here)")
    return list(dict.fromkeys(differences))


def _shape_refusals(manifest: Manifest, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    if manifest.parts:  # an input of a part is PART/INPUT
        reasons = [
            f"has no part {name.partition('/')[0]!r}" for name in shapes if name.partition("/")[0] not in manifest.parts
        ]
        for part in manifest.parts:
            own = {
                name.removeprefix(f"{part}/"): shape for name, shape in shapes.items() if name.startswith(f"{part}/")
            }
            reasons += [f"{part}: {why}" for why in _shape_refusals(manifest.part(part), own)]
        return reasons
    unknown = [name for name in shapes if name not in manifest.inputs]
    if unknown:
        return [f"has no input {', '.join(unknown)} (has: {', '.join(manifest.inputs)})"]
    if shapes and not any(_covers(profile, shapes) for profile in manifest.profiles):
        asked = ", ".join(f"{name}={_shape(shape)}" for name, shape in shapes.items())
        spans = "; ".join(
            f"{profile.name}: "
            + ", ".join(f"{name} {_shape(span.min)} to {_shape(span.max)}" for name, span in profile.inputs.items())
            for profile in manifest.profiles
        )
        return [f"no profile covers {asked} ({spans or 'there is none'})"]
    return []


def _covers(profile: Profile, shapes: Mapping[str, Sequence[int]]) -> bool:
    return all(
        name in profile.inputs and _inside(shape, profile.inputs[name].min, profile.inputs[name].max)
        for name, shape in shapes.items()
    )


def _inside(shape: Sequence[int], low: Sequence[int], high: Sequence[int]) -> bool:
    return len(shape) == len(low) == len(high) and all(
        least <= size <= most for size, least, most in zip(shape, low, high, strict=True)
    )


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _ranked(fitting: list[Manifest], request: Request) -> list[Manifest]:
    """Return engines that fit, best first."""
    ranked: list[Manifest] = []
    for on_cpu in (False, True):
        group = [manifest for manifest in fitting if (CPU in manifest.compatibility.gpus) is on_cpu]
        if group:
            newest = max(group, key=_age)
            wish, source = newest.precision.wish, newest.provenance.source
            current = [manifest for manifest in group if manifest.provenance.source == source]
            times = _times(current, request)
            fastest = min(times.values(), default=0.0)
            # Sorts are stable: the last criterion first.
            group.sort(key=_age, reverse=True)
            group.sort(key=lambda manifest: _position(wish, manifest.precision.asked))
            group.sort(key=lambda manifest: not manifest.verification.engine.executed)
            group.sort(key=lambda manifest: _slowness(times.get(str(manifest.identity)), fastest))
            group.sort(key=lambda manifest: manifest.provenance.source != source)
            ranked.extend(group)
    return ranked


def _slowness(time: float | None, fastest: float) -> float:
    if time is None:
        return float("inf")
    return time if time > fastest * (1 + AS_FAST) else fastest


def _times(manifests: Iterable[Manifest], request: Request) -> dict[str, float]:
    """Return the time of every engine that was measured as the newest of them was, by name, in milliseconds.

    That is on a device of one name, which is here, and at all cases of the newest (at those whose profile covers the shapes
    that are asked for): the geometric mean over cases of the median latency, each run in its better way.
    """
    here = {gpu.name for gpu in request.devices}
    measured = [
        (manifest, device, cases)
        for manifest in manifests
        for device, cases in [_measured(manifest, request.shapes)]
        if device in here and cases
    ]
    if not measured:
        return {}
    _newest, where, yardstick = max(measured, key=lambda one: _age(one[0]))
    return {
        str(manifest.identity): mean_ms({name: cases[name] for name in yardstick})
        for manifest, device, cases in measured
        if device == where and yardstick.keys() <= cases.keys()
    }


def _measured(manifest: Manifest, shapes: Mapping[str, Sequence[int]]) -> tuple[str | None, dict[str, float]]:
    """Return the device that an engine was timed on, and its least median latency of each case; of parts all or none."""
    parts = {name: manifest.part(name) for name in manifest.parts} if manifest.parts else {"": manifest}
    devices = {None if one.benchmark is None else one.benchmark.device for one in parts.values()}
    if len(devices) != 1 or None in devices:
        return None, {}
    cases: dict[str, float] = {}
    for name, one in parts.items():
        own = {key.removeprefix(f"{name}/"): shape for key, shape in shapes.items() if key.startswith(f"{name}/")}
        asked = own if name else shapes
        covering = {profile.name for profile in one.profiles if _covers(profile, asked)}
        cases |= {f"{name}/{case}": ms for case, ms in _best(one.benchmark, covering).items()}
    return devices.pop(), cases


def _best(benchmark: BenchmarkFacts | None, profiles: Collection[str]) -> dict[str, float]:
    best: dict[str, float] = {}
    for case in benchmark.cases if benchmark is not None else ():
        if case.profile in profiles:
            best[case.name] = min(case.latency_ms.p50, best.get(case.name, case.latency_ms.p50))
    return best


def _age(manifest: Manifest) -> tuple[str, str]:
    # RFC 3339 in UTC sorts as text; a fraction of a second comes after its absence only without the Z.
    return manifest.identity.created.removesuffix("Z"), str(manifest.identity)


def _position(wish: Sequence[str], precision: str) -> int:
    return wish.index(precision) if precision in wish else len(wish)


def _reads(fallback: FallbackFacts, found: str, verified: str) -> bool:
    """Tell whether a version reads what another one verified; what is after "+" says only what it was built for."""
    here, there = found.partition("+")[0], verified.partition("+")[0]
    same = _numbers(here)[:2] == _numbers(there)[:2] or all(
        one.form != EXPORTED_PROGRAM for one in fallback.saved.values()
    )
    return same and _at_least(here, there)


def _at_least(found: str | None, needed: str) -> bool:
    return found is not None and _numbers(found) >= _numbers(needed)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]+", version))
