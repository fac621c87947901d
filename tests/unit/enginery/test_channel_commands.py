"""promote, rollback, history and sign, as a user meets them."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from artifacts.catalog import EngineCatalog, EngineId
from artifacts.channels import move_channel, read_channel
from artifacts.collector import Collector
from artifacts.errors import ChannelError
from artifacts.folder import FolderStore
from artifacts.garbage import Policy
from artifacts.manifest import Manifest
from artifacts.store import ObjectInfo
from enginery import bench_commands, catalog_commands, channel_commands, run_commands, sign_commands
from enginery.moving import Mover
from tests.engines import make_engine
from tests.keys import make_key, write_policy
from tests.unit.artifacts.test_promotion import NOT_RUN, RAN, timed

SM89, SM80 = "tensorrt-rtx-1.7.1.116-sm89", "tensorrt-rtx-1.7.1.116-sm80"
ASK = ("--gpu", "sm89", "--runtime", "tensorrt-rtx==1.7.1.116", "--os", "linux", "--arch", "x86_64")


class Shell:
    """A user with a store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = FolderStore(folder / "store")
        self.environment = {"ENGINERY_STORE": str(self.store.root), "ENGINERY_STATE": str(folder / "state")}
        self.app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
        for module in (bench_commands, catalog_commands, channel_commands, run_commands, sign_commands):
            module.register(self.app)

    def __call__(self, *arguments: str, status: int = 0) -> Result:
        unset = dict.fromkeys(("ENGINERY_TRUST", "ENGINERY_SIGN_KEY"))
        done = CliRunner().invoke(self.app, [*arguments], env=unset | self.environment)
        assert done.exit_code == status, (done.stdout, done.stderr, done.exception)
        return done

    def publish(self, build: str, target: str = SM89, engine: Any = RAN, **changes: Any) -> EngineId:
        manifest = make_engine(self.store, self.folder, build.encode(), recipe="digits", target=target, build=build)
        document = json.loads(manifest.to_bytes())
        document["verification"]["engine"] = engine
        for part, value in changes.items():
            document[part] = value
        manifest = Manifest.from_bytes(json.dumps(document).encode())
        EngineCatalog(self.store).publish(manifest)
        return EngineId.of(manifest.identity)

    def names(self, channel: str = "production", target: str = SM89) -> list[str]:
        found = read_channel(self.store, "digits", target, channel)
        return [] if found is None else [signed.move.build for signed in found.moves]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_promote_resolve_rollback_history(shell: Shell) -> None:
    first, second = shell.publish("fp16-a"), shell.publish("fp16-b")
    done = shell("promote", str(first), "--channel", "production", "--reason", "release 1", "--by", "ada")
    assert done.stdout == f"production: {first}\n"
    assert "move 1 by ada, not signed; speed not compared" in done.stderr
    assert shell("resolve", "digits", *ASK, "--channel", "production").stdout == f"{first}\n"
    shell("promote", "fp16-b", "--channel", "production")
    assert shell("resolve", "digits", *ASK, "--channel", "production").stdout == f"{second}\n"
    assert "names fp16-b already" in shell("promote", "fp16-b", "--channel", "production").stderr
    assert (
        shell("rollback", "digits", "--channel", "production", "--reason", "labels").stdout == f"production: {first}\n"
    )
    told = shell("history", "digits").stdout
    lines = [line for line in told.splitlines() if "production" in line]
    assert [("promote: release 1" in lines[0]), ("rollback: labels" in lines[2])] == [True, True]
    assert "0123456789ab" in lines[0]
    assert "ada" in lines[0]
    moves = json.loads(shell("history", "digits", "--channel", "production", "--json").stdout)
    assert [(move["sequence"], move["build"], move["action"]) for move in moves] == [
        (1, "fp16-a", "promote"),
        (2, "fp16-b", "promote"),
        (3, "fp16-a", "rollback"),
    ]
    assert moves[0]["commit"] == "0123456789abcdef0123456789abcdef01234567"
    assert moves[0]["signed_by"] is None
    assert "@" in moves[1]["by"]


def test_an_engine_that_did_not_pass_its_gates_is_never_promoted(shell: Shell) -> None:
    document = json.loads(make_engine(shell.store, shell.folder).to_bytes())["verification"] | {"passed": False}
    shell.publish("fp16-a", verification=document | {"engine": RAN})
    for flags in ((), ("--allow-unexecuted", "--allow-slower", "--reason", "please")):
        done = shell("promote", "fp16-a", "--channel", "production", *flags, status=1)
        assert "its gates did not pass" in done.stderr
        assert "to promote it all the same" not in done.stderr
    assert shell.names() == []


def test_an_engine_that_was_not_executed_needs_a_flag_and_a_reason(shell: Shell) -> None:
    shell.publish("fp16-a", engine=NOT_RUN)
    done = shell("promote", "fp16-a", "--channel", "production", status=1)
    assert "no such GPU here" in done.stderr
    assert "--allow-unexecuted --reason WHY" in done.stderr
    assert (
        "needs --reason" in shell("promote", "fp16-a", "--channel", "production", "--allow-unexecuted", status=2).stderr
    )
    done = shell("promote", "fp16-a", "--channel", "production", "--allow-unexecuted", "--reason", "no sm89 in CI")
    assert "WARNING: promoted though unexecuted (no sm89 in CI)" in done.stderr
    (move,) = json.loads(shell("history", "digits", "--json").stdout)
    assert (move["waived"], move["reason"]) == (["unexecuted"], "no sm89 in CI")


def test_an_engine_that_is_slower_needs_a_flag_and_a_reason(shell: Shell) -> None:
    def benchmark(p50: float) -> Any:
        return json.loads(timed(one=p50).to_bytes())["benchmark"]

    for build, p50 in (("fp16-a", 1.0), ("fp16-b", 1.04), ("fp16-c", 1.2), ("fp16-d", 0.6)):
        shell.publish(build, benchmark=benchmark(p50))
    shell("promote", "fp16-a", "--channel", "production")
    assert "4.0% slower than before" in shell("promote", "fp16-b", "--channel", "production").stderr
    done = shell("promote", "fp16-c", "--channel", "production", status=1)
    assert "15.4% slower than the one that it replaces (1.200 ms instead of 1.040 ms" in done.stderr
    assert "--allow-slower --reason WHY" in done.stderr
    shell("promote", "fp16-c", "--channel", "production", "--max-slower", "0.2")
    shell("rollback", "digits", "--channel", "production")
    shell("promote", "fp16-c", "--channel", "production", "--allow-slower", "--reason", "more accurate")
    assert "50.0% faster than before" in shell("promote", "fp16-d", "--channel", "production").stderr
    moves = json.loads(shell("history", "digits", "--json").stdout)
    assert [move["waived"] for move in moves] == [[], [], [], [], ["slower"], []]
    assert moves[4]["speed"] == {"device": "H200", "case": "one", "p50_ms": 1.2, "replaced_p50_ms": 1.04}


def test_what_cannot_be_promoted(shell: Shell) -> None:
    engine = shell.publish("fp16-a")
    assert "is not a channel's name" in shell("promote", "fp16-a", "--channel", "../x", status=1).stderr
    assert "no engine 'fp32'" in shell("promote", "fp32", "--channel", "production", status=1).stderr
    shell.store.delete(f"{engine.path}/model.plan")
    assert "model.plan is gone or cut" in shell("promote", "fp16-a", "--channel", "production", status=1).stderr
    assert shell.names() == []


def test_rollback_of_several_targets_has_to_be_said(shell: Shell) -> None:
    for build in ("fp16-a", "fp16-b"):
        for target in (SM89, SM80):
            shell.publish(build, target)
            shell("promote", f"digits/{target}/{build}", "--channel", "production")
    done = shell("rollback", "digits", "--channel", "production", status=2)
    assert f"give digits/{SM80} or digits/{SM89}, or --all-targets" in done.stderr
    shell("rollback", f"digits/{SM80}", "--channel", "production")
    assert (shell.names(target=SM80)[-1], shell.names()[-1]) == ("fp16-a", "fp16-b")
    shell("rollback", f"digits/{SM80}", "--channel", "production", "--to", "fp16-b")
    shell("rollback", "digits", "--channel", "production", "--all-targets")
    assert (shell.names(target=SM80)[-1], shell.names()[-1]) == ("fp16-a", "fp16-a")


def test_rollbacks_that_lead_nowhere(shell: Shell) -> None:
    assert "nothing was ever promoted" in shell("rollback", "digits", "--channel", "production", status=1).stderr
    first = shell.publish("fp16-a")
    shell("promote", "fp16-a", "--channel", "production")
    assert "never named an earlier build" in shell("rollback", "digits", "--channel", "production", status=1).stderr
    assert "it has it for" in shell("rollback", "digits/other", "--channel", "production", status=1).stderr
    done = shell("rollback", "digits", "--channel", "production", "--to", "fp16-z", status=1)
    assert "never named fp16-z" in done.stderr
    shell.publish("fp16-b")
    shell("promote", "fp16-b", "--channel", "production")
    shell.store.delete(f"{first.path}/manifest.json")
    assert "nothing at engines/digits" in shell("rollback", "digits", "--channel", "production", status=1).stderr
    assert shell.names() == ["fp16-a", "fp16-b"]


class OtherClock(FolderStore):
    """A store whose clock is not this host's, as a server's need not be."""

    ahead = 0.0

    def info(self, path: str) -> ObjectInfo | None:
        found = super().info(path)
        return None if found is None else replace(found, modified=found.modified + self.ahead)

    def infos(self, paths: Collection[str]) -> dict[str, ObjectInfo]:
        return {path: found for path in paths for found in [self.info(path)] if found is not None}

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for found in super().list(prefix):
            yield replace(found, modified=found.modified + self.ahead)


@pytest.mark.parametrize("days", [-2, 2])
def test_a_movers_clock_two_days_off_does_not_change_what_gc_removes(shell: Shell, days: int) -> None:
    """What a channel named until a moment ago stays for the grace period, and no longer, by the store's clock."""
    store = OtherClock(shell.store.root)
    store.ahead = days * 86400.0
    builds = [shell.publish(f"fp16-{name}") for name in "abcd"]
    mover = Mover(EngineCatalog(store), "me")
    for build in builds[:3]:
        mover.promote(build, "production")
    times = [signed.move.time for signed in read_channel(store, "digits", SM89, "production").moves]
    expected = dt.datetime.now(dt.timezone.utc) + dt.timedelta(days=days)
    assert all(
        abs(dt.datetime.fromisoformat(f"{time[:-1]}+00:00") - expected) < dt.timedelta(minutes=10) for time in times
    )
    old = time.time() - 10 * 86400.0
    for path in store.root.rglob("*.plan"):
        os.utime(path.with_name("manifest.json"), (old, old))
        os.utime(path, (old, old))
    policy = Policy(keep_days=0, keep_newest=0, keep_moves=0, grace=86400.0)
    gone = {removal.path for removal in Collector(store, policy).collect().removed}
    assert {build.build for build in builds if f"{build.path}/manifest.json" in gone} == {"fp16-d"}
    # Nor does the time that an earlier release wrote, by its host's clock.
    fields = {"action": "promote", "build": "fp16-a", "manifest": None, "by": "me", "time": "2026-01-01T00:00:00Z"}
    move_channel(store, "digits", SM89, "production", lambda _found: fields)
    assert Collector(store, policy).collect().removed == ()


class Overtaken(FolderStore):
    """A folder in which somebody else is faster, once, when a channel is about to be written."""

    def __init__(self, root: Path, rival: Callable[[], object]) -> None:
        super().__init__(root)
        self.rival: Callable[[], object] | None = rival

    def write(self, path: str, data: bytes, *, if_absent: bool = False, if_version: str | None = None) -> bool:
        if path.startswith("channels/") and self.rival is not None:
            rival, self.rival = self.rival, None
            rival()
        return super().write(path, data, if_absent=if_absent, if_version=if_version)


def test_who_is_overtaken_decides_anew(shell: Shell) -> None:
    slow, fast = (
        shell.publish(build, benchmark=timed(one=ms).to_json()["benchmark"])
        for build, ms in (("fp16-slow", 9.0), ("fp16-fast", 1.0))
    )
    rival = Mover(EngineCatalog(shell.store), "rival")

    def overtaken(engine: EngineId | None) -> Mover:
        store = Overtaken(shell.store.root, lambda: rival.promote(engine, "production") if engine else roll_back(rival))
        return Mover(EngineCatalog(store), "me")

    # What was first in an empty channel is by now slower than what is there.
    with pytest.raises(ChannelError, match="slower than the one that it replaces"):
        overtaken(fast).promote(slow, "production")
    assert shell.names() == ["fp16-fast"]
    third, fourth = shell.publish("fp16-c"), shell.publish("fp16-d")
    overtaken(third).promote(fourth, "production")
    assert shell.names() == ["fp16-fast", "fp16-c", "fp16-d"]
    # Of two who roll back what both see, one does.
    with pytest.raises(ChannelError, match=r"at the same time rival moved it to fp16-c \(move 4, rollback\)"):
        roll_back(overtaken(None))
    assert shell.names() == ["fp16-fast", "fp16-c", "fp16-d", "fp16-c"]


def roll_back(mover: Mover) -> object:
    return mover.rollback("digits", SM89, "production")


def test_what_waits_for_its_publication_is_not_promoted(shell: Shell) -> None:
    engine = shell.publish("fp16-a")
    (publication,) = (info.path for info in shell.store.list("publications/"))
    shell.store.delete(publication)
    with pytest.raises(ChannelError, match="published together with is not complete"):
        Mover(EngineCatalog(shell.store), "me").promote(engine, "production")
    assert shell.names() == []


def test_a_channel_is_not_rolled_back_to_what_waits_for_its_publication(shell: Shell) -> None:
    mover = Mover(EngineCatalog(shell.store), "me")
    mover.promote(shell.publish("fp16-a"), "production")
    (publication,) = (info.path for info in shell.store.list("publications/"))
    mover.promote(shell.publish("fp16-b"), "production")
    shell.store.delete(publication)
    with pytest.raises(ChannelError, match="published together with is not complete"):
        roll_back(mover)
    assert shell.names() == ["fp16-a", "fp16-b"]


def test_history_of_nothing_and_of_a_hostile_store(shell: Shell) -> None:
    assert "nothing was ever promoted" in shell("history", "digits").stderr
    shell.publish("fp16-a")
    shell("promote", "fp16-a", "--channel", "production", "--reason", "\x1b[2Jgone")
    told = shell("history", "digits").stdout
    assert "\x1b" not in told
    assert "gone" in told


def test_signing_promoting_and_pulling_by_a_policy(shell: Shell, tmp_path: Path) -> None:
    key, policy = make_key(tmp_path), None
    policy = str(write_policy(tmp_path, key))
    first, second = shell.publish("fp16-a"), shell.publish("fp16-b")
    to = ("--to", str(tmp_path / "pulled"))
    warned = shell("pull", "digits", *ASK, *to).stderr
    assert warned.count("warning: no trust policy") == 1
    shell.environment["ENGINERY_TRUST"] = policy
    assert "is not signed" in shell("pull", "digits", *ASK, *to, status=1).stderr
    assert "is not signed" in shell("resolve", "digits", *ASK, status=1).stderr
    assert "WARNING: no signature is checked" in shell("pull", "digits", *ASK, *to, "--insecure-no-trust").stderr
    assert "with which key?" in shell("sign", "fp16-a", status=2).stderr
    signed = json.loads(shell("sign", "fp16-a", "fp16-b", "--key", str(key.private), "--json").stdout)
    assert [(one["engine"], one["key"]) for one in signed] == [
        (str(first), key.fingerprint),
        (str(second), key.fingerprint),
    ]
    shell("pull", "digits", *ASK, *to)
    assert "is not signed" in shell("promote", "fp16-a", "--channel", "production", status=1).stderr
    shell.environment["ENGINERY_SIGN_KEY"] = str(key.private)
    assert "signed" in shell("promote", "fp16-a", "--channel", "production").stderr
    shell("pull", "digits", *ASK, *to, "--channel", "production")
    (move,) = json.loads(shell("history", "digits", "--json").stdout)
    assert move["signed_by"] == key.fingerprint


def test_verify_run_and_bench_hold_to_the_policy(shell: Shell, tmp_path: Path) -> None:
    """Before a byte reaches a runtime: these engines are no plans at all."""
    key = make_key(tmp_path)
    shell.environment["ENGINERY_TRUST"] = str(write_policy(tmp_path, key))
    signed, bare = shell.publish("fp16-a"), shell.publish("fp16-b")
    shell("sign", str(signed), "--key", str(key.private))
    rows = json.loads(shell("verify", "--json", status=1).stdout)
    assert [(row["engine"], row["state"]) for row in rows] == [(str(signed), "whole"), (str(bare), "untrusted")]
    assert "is not signed" in rows[1]["found"]
    rows = json.loads(shell("verify", "--json", "--insecure-no-trust").stdout)
    assert [row["state"] for row in rows] == ["whole", "whole"]
    for command in (("run", "fp16-b", "--input", "none.npz"), ("bench", "fp16-b")):
        assert "is not signed" in shell(*command, status=1).stderr
    shell("pull", "digits", *ASK, "--to", str(tmp_path / "pulled"))
    folder = tmp_path / "pulled" / str(signed)
    assert json.loads(shell("verify", str(folder), "--json").stdout)[0]["state"] == "whole"
    (folder / "manifest.json.sig").unlink()
    assert json.loads(shell("verify", str(folder), "--json", status=1).stdout)[0]["state"] == "untrusted"
    assert "is not signed" in shell("run", str(folder), "--input", "none.npz", status=1).stderr


def test_engines_whose_gates_did_not_pass_are_not_signed(shell: Shell, tmp_path: Path) -> None:
    document = json.loads(make_engine(shell.store, tmp_path).to_bytes())["verification"] | {"passed": False}
    engine = shell.publish("fp16-a", verification=document)
    done = shell("sign", "fp16-a", "--key", str(make_key(tmp_path).private), status=1)
    assert "its gates did not pass" in done.stderr
    assert list(shell.store.list(f"{engine.path}/signatures/")) == []


def test_a_policy_that_is_wrong_is_a_wrong_command_line(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "trust.yaml").write_text("enginery-trust: 1\nkeys: []\nallow: []\n")
    shell.publish("fp16-a")
    done = shell("resolve", "digits", *ASK, "--trust", str(tmp_path / "trust.yaml"), status=2)
    assert "trust.yaml:2: keys: " in done.stderr


def test_every_command_teaches_by_an_example(shell: Shell) -> None:
    for command in ("promote", "rollback", "history", "sign"):
        assert f"Example: enginery {command}" in shell(command, "--help").stdout


def test_help_shows_no_key(shell: Shell) -> None:
    shell.environment["ENGINERY_SIGN_KEY"] = "pkcs11:object=x?pin-value=5ecret"
    for command in ("promote", "rollback", "sign"):
        assert "5ecret" not in shell(command, "--help").output


def test_a_build_whose_key_is_gone_ends_before_it_begins(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "enginery", "build", "absent.yaml"],
        env={**os.environ, "ENGINERY_SIGN_KEY": str(tmp_path / "gone.pem")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "gone.pem is no file (set by ENGINERY_SIGN_KEY)" in done.stderr
