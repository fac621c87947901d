"""An S3 service that fails: right result or clear error, never a false success.

    python -m bench.faults.proxy RESULT.json [--operations 600] [--seed N] [--share 0.2] [--servers moto,rclone]

A proxy before a real S3 server does one of FAULTS to a share of the requests, drawn from a seed. Through it, in processes of
their own, engines are published, promoted, rolled back, pulled, listed, and records are kept and looked up. Each operation
ends with a value, which is compared with what the store really holds (asked without the proxy), or with an error of the
product, in words; anything else, a traceback or a process that does not end, is a violation. After each, every invariant of
the store is checked (`bench.faults.checker`).
"""

from __future__ import annotations

import argparse
import http.client
import random
import socket
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any, Final
from urllib.parse import urlsplit

from artifacts.catalog import EngineCatalog
from artifacts.channels import read_channel
from artifacts.refs import digest_bytes
from bench.faults.checker import State, check, lost
from bench.faults.servers import rclone_with_bucket, s3_with_bucket
from bench.faults.world import CHANNEL, RECIPES, TARGET, Action, Actors, Place, engine, make_place, write_json
from enginery import client

FAULTS: Final[Mapping[str, str]] = {
    "500": "the server says InternalError, and has done nothing",
    "503": "the server says SlowDown, and has done nothing",
    "500 after all": "the server says InternalError, and has done it",
    "reset": "the connection is reset before the server has seen the request",
    "lost": "the connection is closed after the server has done it, without an answer",
    "cut": "the answer's body ends in the middle, and the connection with it",
    "slow": "the answer's body comes in drops",
}
SERVERS: Final = ("moto", "rclone")
_CODES: Final = {"500": (500, "InternalError"), "503": (503, "SlowDown"), "500 after all": (500, "InternalError")}
_BUCKET: Final = "enginery-faults"
_DROPS: Final = 8
_DROP_SECONDS: Final = 0.02
_TIMEOUT: Final = 180.0


class Weather:
    """Which fault the next request meets, if any: a share of them, drawn from a seed. Counts what was done."""

    def __init__(self, seed: int, share: float) -> None:
        self.share, self.made = share, Counter[str]()
        self._chance, self._lock = random.Random(seed), Lock()

    def next(self) -> str | None:
        """Return a name of FAULTS, or None."""
        with self._lock:
            if self._chance.random() >= self.share:
                self.made["none"] += 1
                return None
            fault = self._chance.choice(list(FAULTS))
            self.made[fault] += 1
            return fault


@contextmanager
def failing(endpoint: str, weather: Weather) -> Iterator[str]:
    """Run the proxy before `endpoint`; yield its address."""

    class Handler(_Proxy):
        upstream = urlsplit(endpoint).netloc
        sky = weather

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: str
    sky: Weather

    def do_any(self) -> None:
        fault = self.sky.next()
        body = self._body()
        if fault in ("500", "503"):
            return self._refuse(fault)
        if fault == "reset":
            # With a linger of nothing, closing resets.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return self._close()
        status, headers, content = self._forward(body)
        match fault:
            case "lost":
                return self._close()
            case "500 after all":
                return self._refuse(fault)
            case "cut" if content:
                headers = {**headers, "Content-Length": str(len(content))}
                self._answer(status, headers, content[: len(content) // 2])
                return self._close()
            case "slow" if content:
                return self._answer(status, headers, content, pause=_DROP_SECONDS)
        return self._answer(status, headers, content)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = do_any  # noqa: N815 - the names that http.server calls

    def _body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_expect_100(self) -> bool:
        """Answer it in `_body`, after the fault is drawn."""
        return True

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection(self.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        try:
            upstream.request(self.command, self.path, body, headers)
            response = upstream.getresponse()
            passed = {k: v for k, v in response.getheaders() if k.lower() not in ("connection", "server", "date")}
            content = response.read()
        finally:
            upstream.close()
        if passed.pop("Transfer-Encoding", None):
            passed["Content-Length"] = str(len(content))
        return response.status, passed, content

    def _refuse(self, fault: str) -> None:
        status, code = _CODES[fault]
        text = f"<Error><Code>{code}</Code><Message>said the proxy</Message></Error>".encode()
        self._answer(status, {"Content-Length": str(len(text)), "Content-Type": "application/xml"}, text)

    def _answer(self, status: int, headers: Mapping[str, str], content: bytes, pause: float = 0.0) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            size = -(-len(content) // _DROPS) if pause else len(content)
            for start in range(0, len(content), size or 1):
                self.wfile.write(content[start : start + size])
                time.sleep(pause)

    def _close(self) -> None:
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Say nothing."""


# ---- the campaign ---------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What a campaign came to."""

    operations: Counter[str] = field(default_factory=Counter)
    done: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    faults: Mapping[str, int] = field(default_factory=dict)
    longest_seconds: float = 0.0
    seconds: float = 0.0


class Campaign:
    """One store: `through` reaches it by the proxy, `real` without."""

    def __init__(self, through: Place, real: Place, actors: Actors, seed: int) -> None:
        self.through, self.real, self.actors = through, real, actors
        self.store, self.judge = real.store, real.judge
        self.chance, self.tally = random.Random(seed), Tally()
        self.known: set[str] = set()
        self.before = State()
        self.engines: list[int] = []
        self.number = 0

    def step(self) -> None:
        """Do one operation through the proxy, and judge what it said."""
        action = self._choose()
        begin = time.perf_counter()
        moves = self._moves()
        answer = self.actors.run(action, self.through, _TIMEOUT)
        tally = self.tally
        tally.longest_seconds = round(max(tally.longest_seconds, time.perf_counter() - begin), 1)
        tally.operations[action.name] += 1
        if "value" in answer:
            tally.done += 1
            wrong = self._wrong(action, answer["value"], moves)
            if wrong:
                tally.violations.append(f"{action}: false success: {wrong}")
        elif "error" in answer:
            tally.refused[str(answer["error"]).partition(":")[0]] += 1
            if len(self._moves()) > len(moves) + 1:
                tally.violations.append(f"{action}: moved twice")
        else:
            tally.violations.append(f"{action}: {answer['crash']}")
        report = check(self.store, self.judge, known=self.known)
        tally.violations += [
            f"after {action}: {name}: {words}" for name, words in report.violations + lost(self.before, report.state)
        ]
        self.before = report.state

    def _choose(self) -> Action:
        names = ["publish", "keep"] if not self.engines else ["publish", "keep", "promote", "promote", "pull", "listed"]
        names += ["rollback", "follow"] if len(self._moves()) > 1 else []
        name = self.chance.choice(names)
        match name:
            case "publish":
                # Also again, what was refused, which must then be completed.
                if self.number in self.engines or not self.number or self.chance.random() < 0.3:
                    self.number += 1
                return Action(name, (RECIPES[0], self.number))
            case "keep":
                return Action(name, (self.chance.randrange(5),))
            case "promote":
                return Action(name, (RECIPES[0], self.chance.choice(self.engines)))
            case "pull":
                to = str(self.real.folder / f"pulled-{self.chance.randrange(3)}")
                return Action(name, (RECIPES[0], self.chance.choice(self.engines), to))
            case "follow":
                return Action(name, (RECIPES[0], str(self.real.folder / "followed")))
        return Action(name, (RECIPES[0],))

    def _wrong(self, action: Action, value: Any, moves: tuple[str, ...]) -> str:
        """Return what is not as the operation's value says; nothing where all is."""
        found = read_channel(self.store, RECIPES[0], TARGET, CHANNEL)
        head = found.head.move.build if found is not None else None
        match action.name:
            case "publish":
                catalog, name = EngineCatalog(self.store), engine(*action.arguments)
                if name not in catalog.engines() or digest_bytes(catalog.manifest_bytes(name)) != value:
                    return f"{name} is not published with a manifest {value}"
                self.engines = sorted({*self.engines, action.arguments[1]})
            case "promote" | "rollback":
                if head != value or not 0 <= len(self._moves()) - len(moves) <= 1:
                    return f"the channel names {head} by {len(self._moves())} moves, not {value}; it had {len(moves)}"
            case "follow":
                return "" if value == head else f"pulled {value}, and the channel names {head}"
            case "pull":
                client.check(Path(value), trust=self.judge)
            case "listed":
                there = [name.build for name in EngineCatalog(self.store).engines(RECIPES[0])]
                return "" if value == there else f"listed {value}, and there are {there}"
            case "keep":
                return "" if value else "a record that was just kept is a miss"
        return ""

    def _moves(self) -> tuple[str, ...]:
        found = read_channel(self.store, RECIPES[0], TARGET, CHANNEL)
        return tuple(signed.move.id for signed in found.moves) if found is not None else ()


def campaign(
    server: str,
    operations: int,
    seed: int,
    share: float,
    folder: Path,
    actors: Actors,
    tell: Callable[[Tally], None] = lambda _tally: None,
) -> Tally:
    """Do so many operations on a new store of one server, a share of whose requests fail; return what they came to.

    `tell` gets what they came to until then after each, so that a long run that is stopped has told it.
    """
    begin = time.perf_counter()
    with ExitStack() as stack:
        if server == "rclone":
            environment = stack.enter_context(rclone_with_bucket(_BUCKET, folder / "served"))
            # The safe path where conditions are ignored.
            environment["ENGINERY_S3_LOCKS"] = str(folder / "locks")
        else:
            environment = stack.enter_context(s3_with_bucket(_BUCKET))
        weather = Weather(seed, share)
        address = stack.enter_context(failing(environment["AWS_ENDPOINT_URL_S3"], weather))
        uri = f"s3://{_BUCKET}/store"
        real = make_place(folder / "place", uri, environment)
        through = Place(uri, real.folder, {**environment, "AWS_ENDPOINT_URL_S3": address})
        real.enter()
        run = Campaign(through, real, actors, seed)
        for _ in range(operations):
            run.step()
            run.tally.faults = dict(weather.made)
            run.tally.seconds = round(time.perf_counter() - begin, 1)
            tell(run.tally)
    return run.tally


def main() -> None:
    """Run the campaigns that the command line asks for; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--operations", type=int, default=600, help="of all servers together")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--share", type=float, default=0.2, help="of the requests that meet a fault")
    parser.add_argument("--servers", default=",".join(SERVERS))
    given = parser.parse_args()
    servers, actors = given.servers.split(","), Actors()
    tallies: dict[str, Any] = {}
    for server in servers:

        def tell(tally: Tally, server: str = server) -> None:
            tallies[server] = vars(tally)
            command = (
                f"python -m bench.faults.proxy RESULT.json --operations {given.operations} --servers {given.servers}"
            )
            command += f" --seed {given.seed} --share {given.share}"
            about = {
                "what": "bench/faults/proxy.py",
                "command": command,
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
            }
            write_json(given.result, {**about, "seed": given.seed, "share": given.share, "by_server": tallies})

        with tempfile.TemporaryDirectory() as base:
            count = given.operations // len(servers)
            tally = campaign(server, count, given.seed, given.share, Path(base), actors, tell)
        print(f"{server}: {vars(tally)}", flush=True)
    if any(tally["violations"] for tally in tallies.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
