"""Who asks for an engine: the options of resolve and pull, and the request that they make."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from enginery.output import FAILED, WRONG, note, stop

if TYPE_CHECKING:
    from artifacts.catalog import EngineCatalog, EngineId
    from artifacts.host import Host
    from artifacts.resolve import Request
    from artifacts.trust import Trust
    from enginery.trusting import Unchecked

EngineArgument = Annotated[str, typer.Argument(metavar="ENGINE", help="Its name, or any part of it that no other has.")]
HostOption = Annotated[
    str | None,
    typer.Option("--host", help="Which host asks: auto (this one), or one recorded with enginery host --record."),
]
GpuOption = Annotated[
    str | None, typer.Option("--gpu", metavar="GPU", help="Instead of a host: a compute capability, sm89, or cpu.")
]
RuntimeOption = Annotated[
    list[str] | None,
    typer.Option("--runtime", metavar="NAME==VERSION", help="With --gpu: what loads the engine. Repeatable."),
]
SystemOption = Annotated[str | None, typer.Option("--os", help="With --gpu: operating system; default: this one's.")]
ArchOption = Annotated[str | None, typer.Option("--arch", help="With --gpu: architecture; default: this one's.")]
ChannelOption = Annotated[str | None, typer.Option("--channel", help="Only what this channel names.")]
PrecisionOption = Annotated[str | None, typer.Option("--precision", help="Only this precision.")]
ShapeOption = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="INPUT=1x3x224x224", help="A profile must cover this. Repeatable."),
]

TrustOption = Annotated[
    Path | None,
    typer.Option(
        "--trust",
        metavar="FILE",
        envvar="ENGINERY_TRUST",
        help="Trust policy: whose signatures count (docs/trust.md).",
    ),
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure-no-trust", help="Check no signature, whatever the policy says. A plan is code.")
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--key", metavar="FILE", envvar="ENGINERY_SIGN_KEY", help="Private key: an EC key's PEM file, or a pkcs11: URI."
    ),
]

_GPU: Final = re.compile(r"sm[0-9]{2,3}|cpu")
_RUNTIME: Final = re.compile(r"([a-z][a-z0-9-]*)==([^\s=]+)")
_SHAPE: Final = re.compile(r"([^=]+)=([0-9]+(?:x[0-9]+)*)")


def policy_of(trust: Path | None, insecure: bool) -> Trust | Unchecked:
    """Return the trust policy that a command's options name; says aloud where no signature will be checked.

    Raises PolicyError where the file cannot be used.
    """
    from enginery.trusting import UNCHECKED, load_trust

    if insecure:
        note("WARNING: no signature is checked (--insecure-no-trust)")
        return UNCHECKED
    if trust is None:
        note("warning: no trust policy (--trust FILE or ENGINERY_TRUST), so digests are checked and signatures are not")
        return UNCHECKED
    return load_trust(trust)


def given_policy(trust: Path | None, insecure: bool) -> Trust | Unchecked:
    """Return what `policy_of` does, without a word where no policy was given: for commands that hand nothing out."""
    from enginery.trusting import UNCHECKED

    return policy_of(trust, insecure) if insecure or trust is not None else UNCHECKED


def require_trusted(catalog: EngineCatalog, engine: EngineId, judge: Trust | Unchecked) -> None:
    """Raise TrustError where a policy does not allow an engine, before its bytes reach a runtime."""
    from enginery.trusting import trust_of

    policy = trust_of(judge)
    if policy is not None:
        data = catalog.manifest_bytes(engine)
        policy.check_engine(catalog.read_manifest(engine, data), data, catalog.signatures(engine, data))


def request_of(
    catalog: EngineCatalog,
    host: str | None,
    gpu: str | None,
    runtimes: list[str] | None,
    system: str | None,
    arch: str | None,
    channel: str | None,
    precision: str | None,
    shapes: list[str] | None,
) -> Request:
    """Return what the options of a command ask for; ends the command (status 2) where they contradict or say nothing."""
    from artifacts.resolve import Request
    from tasks.toolchain import probe_host

    limits: dict[str, Any] = {"shapes": _shapes(shapes or []), "channel": channel, "precision": precision}
    described = {"--gpu": gpu, "--runtime": runtimes, "--os": system, "--arch": arch}
    given = [name for name, value in described.items() if value]
    if host is not None and given:
        raise typer.BadParameter(f"{given[0]} describes another host; give it or --host, not both", param_hint="--host")
    if not given:
        return Request.of_host(_host(catalog, host or "auto"), **limits)
    if gpu is None or not runtimes:
        raise typer.BadParameter(
            "without --host, both --gpu and --runtime are needed, e.g. --gpu sm89 --runtime tensorrt-rtx==1.7.1.116",
            param_hint="--gpu" if gpu is None else "--runtime",
        )
    if _GPU.fullmatch(gpu) is None:
        digits = re.sub(r"\D", "", gpu)
        hint = f"did you mean sm{digits}?" if 2 <= len(digits) <= 3 else "write sm89, or cpu"
        raise typer.BadParameter(f"{gpu!r} is not a compute capability ({hint})", param_hint="--gpu")
    here = probe_host()
    return Request(_runtimes(runtimes), (gpu,), system or here.os, arch or here.arch, **limits)


def _host(catalog: EngineCatalog, name: str) -> Host:
    from artifacts.errors import NotFoundError
    from tasks.toolchain import probe_host

    if name == "auto":
        return probe_host()
    try:
        return catalog.host(name)
    except NotFoundError:
        stop(
            FAILED,
            f"no host {name!r} is recorded in {catalog.store.uri}; record it, on that host, with: "
            "enginery host --record",
        )


def _runtimes(texts: list[str]) -> dict[str, str]:
    from recipes.schema import GPUS
    from tasks.toolchain import FRAMEWORKS

    known = (*GPUS, *FRAMEWORKS)  # which serve fallbacks alone
    found: dict[str, str] = {}
    for text in texts:
        match = _RUNTIME.fullmatch(text)
        if match is None:
            hint = "an engine loads only on the very version it was made for; write tensorrt-rtx==1.7.1.116"
            raise typer.BadParameter(f"{text!r} is not NAME==VERSION ({hint})", param_hint="--runtime")
        if match[1] not in known:
            allowed = ", ".join(known)
            raise typer.BadParameter(f"unknown runtime {match[1]!r} (allowed: {allowed})", param_hint="--runtime")
        found[match[1]] = match[2]
    return found


def _shapes(texts: list[str]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        match = _SHAPE.fullmatch(text)
        if match is None:
            raise typer.BadParameter(f"{text!r} is not INPUT=SIZES (write image=1x3x224x224)", param_hint="--shape")
        found[match[1]] = tuple(int(size) for size in match[2].split("x"))
    return found


def open_catalog(store: str) -> EngineCatalog:
    """Open the engines of a store; what has to be passed over is said on stderr."""
    from artifacts.catalog import EngineCatalog
    from artifacts.store import open_store

    return EngineCatalog(open_store(store), lambda message: note(f"warning: {message}"))


def the_engine(catalog: EngineCatalog, text: str) -> EngineId:
    """Return the one engine that a text can mean; ends the command where there is none, or more than one."""
    found = catalog.find(text)
    if len(found) > 1:
        names = "\n".join(f"  {match}" for match in found)
        stop(WRONG, f"{text!r} is a part of {len(found)} engines' names; give more of one:\n{names}")
    if not found:
        near = catalog.near(text)
        hint = f"did you mean {' or '.join(near)}?" if near else "enginery list names those that are there"
        stop(FAILED, f"no engine {text!r} in {catalog.store.uri}; {hint}")
    return found[0]
