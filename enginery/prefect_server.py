"""The embedded Prefect server: `python -m enginery.prefect_server SOCKET PARENT_PID`, which dies with its build.

Prefect, too, starts a server where no API address is configured, but that one outlives a build that is killed. This
one is ended by the kernel (prctl(2), PR_SET_PDEATHSIG). Its socket is made by the build: no port is guessed, and what
is asked before the server is up waits in the socket's queue.
"""

from __future__ import annotations

import atexit
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import IO, Final

START_SECONDS: Final = 120.0
_STOP_SECONDS: Final = 5.0
_ROOT: Final = Path(__file__).resolve().parent.parent
_EMBEDDED: Final = b"embedded\n"
# The working folder comes first, with -m too: a recipes.py or tasks.py there must not hide ours.
_SERVE: Final = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
from enginery.prefect_server import main
main()
"""


class EmbeddedServer:
    """A server that starts beside this process, for as long as this process lives."""

    def __init__(self) -> None:
        """Start it, from the thread that lives longest: the kernel ends the server with the thread that started it."""
        path = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), str(_ROOT)]
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - read when the server fails to start
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._port = listener.getsockname()[1]
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, str(listener.fileno()), str(os.getpid())],
                pass_fds=(listener.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
                start_new_session=True,  # Ctrl-C is this process's to handle
            )
        atexit.register(self.stop)

    def address(self) -> str | None:
        """Return the API's address, as soon as it is known that Prefect's settings name no other; else None."""
        said = self._process.stdout.readline() if self._process.stdout is not None else b""
        if said == _EMBEDDED:
            return f"http://127.0.0.1:{self._port}/api"
        if said:
            return None
        raise self._failed()

    def wait(self) -> None:
        """Wait until the server answers. Raises RuntimeError with the server's last words."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=START_SECONDS)
        try:
            connection.request("GET", "/api/health")
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as err:
            raise self._failed() from err
        finally:
            connection.close()
        if status != http.HTTPStatus.OK:
            raise self._failed()

    def stop(self) -> None:
        """End the server, which writes down what it was told; safe to call again."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _failed(self) -> RuntimeError:
        self._log.seek(0)
        words = self._log.read().decode(errors="replace").strip().splitlines()[-3:]
        return RuntimeError("its embedded server did not start" + "".join(f"\n  {line}" for line in words))


@cache
def embedded_server() -> EmbeddedServer | None:
    """Start this process's server, once, and lead Prefect to it; None where Prefect is configured for another.

    To be called before Prefect is imported, since Prefect reads its settings then. Raises RuntimeError.
    """
    if os.environ.get("PREFECT_API_URL"):
        return None
    server = EmbeddedServer()
    address = server.address()
    if address is None:
        return None
    os.environ["PREFECT_API_URL"] = address
    return server


def main() -> None:
    """Serve on the inherited socket, unless Prefect's settings (its profile, files) name a server or want none."""
    from tasks.child import die_with

    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    if settings.api.url is not None or not settings.server.ephemeral.enabled:
        os.write(sys.stdout.fileno(), b"configured\n")
        return
    os.write(sys.stdout.fileno(), _EMBEDDED)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app(ephemeral=True, final=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    server.run(sockets=[socket.socket(fileno=descriptor)])
