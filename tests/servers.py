"""Real servers for tests, on ephemeral ports: S3 (moto; rclone, which ignores conditions), and a bad network before it."""

from __future__ import annotations

import http.client
import os
import re
import subprocess
import sys
import sysconfig
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from urllib.parse import urlsplit

# Listings come in pages of this many, so that paging is exercised without a thousand objects.
S3_PAGE = 7


@contextmanager
def s3_server(page: int = S3_PAGE) -> Iterator[str]:
    """Run an S3 server in a child process, whose listings have so many objects on a page; yield http://127.0.0.1:PORT."""
    environment = os.environ | {"MOTO_S3_DEFAULT_MAX_KEYS": str(page)}
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    ) as server:
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.kill()


@contextmanager
def careless_s3_server(folder: Path) -> Iterator[str]:
    """Serve the sub-folders of `folder` as buckets, by a server that ignores conditional writes; yield its address."""
    command = [str(Path(sysconfig.get_path("scripts")) / "rclone"), "serve", "s3", "--addr", "127.0.0.1:0"]
    command += ["--auth-key", "test,test", "--config", os.devnull, "--vfs-cache-mode", "off", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            said = ""
            while "Starting s3 server on" not in said:
                said = server.stderr.readline()
                if not said:
                    raise AssertionError(f"rclone ended with status {server.wait()}")
            # Its log is read to the end, so that it never waits for somebody who does.
            Thread(target=server.stderr.read, daemon=True).start()
            yield re.search(r"http://127.0.0.1:[0-9]+", said)[0]
        finally:
            server.kill()


def _serve_s3() -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    sys.stdout.write(f"{server.get_host_and_port()[1]}\n")
    sys.stdout.flush()
    sys.stdin.read()  # ends with the parent, however that ends


def s3_environment(endpoint: str) -> dict[str, str]:
    """Return the environment in which boto3 talks to `endpoint`, whatever this machine's own AWS settings are."""
    return {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


@dataclass
class Faults:
    """What a `bad_network` does to the requests that come next; each entry is used up by one request."""

    # Given instead of the server's own, as status and S3 code; None lets one request pass.
    answers: deque[tuple[int, str] | None] = field(default_factory=deque)
    refused: dict[str, tuple[int, str]] = field(
        default_factory=dict
    )  # for every request whose "METHOD /path" has such a part
    lost_answers: int = 0  # requests that reach the server while their answer is lost
    cuts: deque[int] = field(default_factory=deque)  # bytes of a GET's body after which the connection breaks
    flips: int = 0  # GETs in whose body one bit changes on the way
    stalls: int = 0  # requests that are not answered before `over` is set
    # Seconds before the answer to every request whose "METHOD /path" has such a part.
    delays: dict[str, float] = field(default_factory=dict)
    delayed: int = 0  # requests that are, or were
    drops: float = 0.0  # seconds between two bytes of every answer's body; 0: it comes at once
    over: Event = field(default_factory=Event)
    # As Ceph's radosgw 16.2: a write over an ETag in quotes is refused, one without them is taken for what it says.
    refuses_quotes: bool = False
    dropped_headers: frozenset[str] = frozenset()  # for every request
    requests: list[str] = field(default_factory=list)  # what came, as "METHOD /path"


@contextmanager
def bad_network(endpoint: str) -> Iterator[tuple[str, Faults]]:
    """Run a proxy before `endpoint`; yield its address and the faults that it makes."""
    faults = Faults()

    class Handler(_Proxy):
        upstream = urlsplit(endpoint).netloc
        rules = faults

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", faults
        finally:
            faults.over.set()
            server.shutdown()
            thread.join()


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: str
    rules: Faults

    def do_any(self) -> None:
        rules = self.rules
        rules.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if rules.stalls:
            rules.stalls -= 1
            rules.over.wait(60)
            self.close_connection = True
            return
        answer = rules.answers.popleft() if rules.answers else None
        if rules.refuses_quotes and self.headers.get("If-Match", "").startswith('"'):
            answer = (412, "PreconditionFailed")
        answer = next((said for part, said in rules.refused.items() if part in f"{self.command} {self.path}"), answer)
        if answer is not None:
            status, code = answer
            text = f"<Error><Code>{code}</Code><Message>said the proxy</Message></Error>".encode()
            self._answer(status, {"Content-Length": str(len(text)), "Content-Type": "application/xml"}, text)
            return
        upstream = http.client.HTTPConnection(self.upstream)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in rules.dropped_headers}
        if rules.refuses_quotes and "If-Match" in headers:
            headers["If-Match"] = f'"{headers["If-Match"]}"'
        upstream.request(self.command, self.path, body, headers)
        response = upstream.getresponse()
        content = response.read()
        upstream.close()
        for part, seconds in rules.delays.items():
            if part in f"{self.command} {self.path}":
                rules.delayed += 1
                rules.over.wait(seconds)
        if rules.lost_answers:
            rules.lost_answers -= 1
            self.close_connection = True
            return
        if self.command == "GET" and rules.flips:
            rules.flips -= 1
            content = bytes([content[0] ^ 1]) + content[1:]
        if self.command == "GET" and rules.cuts:
            content = content[: rules.cuts.popleft()]
            self.close_connection = True
        passed = {k: v for k, v in response.getheaders() if k.lower() not in ("connection", "server", "date")}
        self._answer(response.status, passed, content)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = do_any  # noqa: N815 - the names that http.server calls

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            if self.rules.drops:
                with suppress(OSError):  # whoever waited has gone
                    for byte in content:
                        self.wfile.write(bytes([byte]))
                        if self.rules.over.wait(self.rules.drops):
                            return
                return
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Say nothing."""


if __name__ == "__main__":
    _serve_s3()
