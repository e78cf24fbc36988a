"""Starts a server as a process group of its own, waits until it answers, and ends all of it."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastmtp.cli import InputError
from fastmtp.engines.address import ANY, HOST, base_url, check_port

LOG_LINES = 25
# The last line of a Python traceback, and what an engine may print before it: "(Worker pid=7) ERROR [x:9] ".
RAISED = re.compile(r"^(?:\([^)]*\) *)?(?:ERROR [^]]*\] *)?([\w.]+(?:Error|Exception): .+)")
RAISED_LINES = 3  # of these lines: the later ones wrap the cause
LAST_LINES = 5  # of the log, behind them
PORTS = range(20000, 30000)  # below those that the system gives to clients, which could take one meanwhile


class ServerError(Exception):
    """The server died or did not come up; the message ends with what its log says."""


class Server:
    """`with Server(command, port) as server:`: a running server; its whole process group ends with the block.

    Raises ServerError when it dies or does not answer within `wait` seconds. `log` keeps its output, for this
    user's eyes only and with `secret` blacked out.
    """

    def __init__(
        self,
        argv: list[str],
        port: int,
        log: Path,
        wait: float = 900.0,
        env: dict[str, str] | None = None,
        stop_patience: float = 15.0,
        host: str = HOST,
        secret: str | None = None,
    ):
        check_port(port)
        self.argv, self.port, self.log, self.wait = argv, port, Path(log), wait
        self.stop_patience, self.host, self.secret = stop_patience, ANY.get(host, host), secret
        self.env = {**os.environ, **_no_proxy(), "PYTHONUNBUFFERED": "1", **(env or {})}
        self.process: subprocess.Popen | None = None
        self.url = base_url(self.host, port)

    def __enter__(self) -> Server:
        try:
            self.start()
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start and do not wait. Raises InputError if the port is taken."""
        if listens(self.host, self.port):
            raise InputError(f"port {self.port} is taken; stop what listens there or choose another --port")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # A command that is asked to end unwinds as if by Ctrl-C, and so ends its servers.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with open(self.log, "wb", opener=_private) as out:
            # A session of its own: Ctrl-C reaches us alone, and we end all of the server's processes in
            # order.
            self.process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if self.secret else out,
                stderr=subprocess.STDOUT,
                env=self.env,
                start_new_session=True,
            )
        if self.secret:
            threading.Thread(target=self._copy_log, daemon=True).start()

    def _copy_log(self) -> None:
        """Write the server's lines to the log without the secret; engines print their arguments."""
        with open(self.log, "ab", buffering=0) as out:
            for line in self.process.stdout:
                out.write(line.replace(self.secret.encode(), b"***"))

    def wait_until_ready(self) -> None:
        """Return when the server answers. Raises ServerError when it dies or does not answer within `wait`
        seconds.
        """
        started = time.monotonic()
        while True:
            if self.process.poll() is not None:
                raise self.death()
            if listens(self.host, self.port) and answers(self.url + "/health"):
                return
            if time.monotonic() - started > self.wait:
                raise ServerError(f"the server does not answer after {self.wait:g} s{self.tail()}")
            time.sleep(0.5)

    def require(self, lines: Sequence[str]) -> None:
        """ServerError unless the log holds each line: engines pass over an extension that does not load."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        if missing := next((line for line in lines if line not in text), None):
            raise ServerError(f"the engine passes over our extension: no '{missing}' in {self.log}")

    def death(self) -> ServerError:
        """What to raise for a server that ended: its exit code, the errors in its log, and the log's end."""
        lines = self._log_lines()
        raised = list(dict.fromkeys(found[1] for line in lines if (found := RAISED.match(line))))
        said = f"the server ended with exit code {self.process.returncode}"
        if not raised:
            return ServerError(said + self.tail())
        shown = [*raised[-RAISED_LINES:], "...", *lines[-LAST_LINES:]]
        return ServerError(f"{said}; errors in {self.log}, and its end:\n" + _indented(shown))

    def tail(self) -> str:
        """The last log lines, to end an error message with."""
        return f"; the end of {self.log}:\n" + _indented(self._log_lines()[-LOG_LINES:])

    def _log_lines(self) -> list[str]:
        with open(self.log, "rb") as stream:
            stream.seek(max(0, os.path.getsize(self.log) - 200_000))
            return stream.read().decode("utf-8", errors="replace").splitlines()

    def stop(self) -> None:
        """End the whole group, politely and then not: a worker left over would hold the GPU's memory."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            self.send(sign)
            with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C: no more patience
                if self.process is None or self._group_ends():
                    return

    def send(self, sign: int) -> None:
        """A signal to all of the server's processes that are still there."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)

    def _group_ends(self) -> bool:
        """Whether every process of the group is gone within `stop_patience` seconds."""
        end = time.monotonic() + self.stop_patience
        while time.monotonic() < end:
            self.process.poll()  # reaps the leader, which would else count as a member
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.05)
        return False


@contextlib.contextmanager
def together(servers: list[Server]) -> Iterator[list[ServerError | None]]:
    """All servers started at once; what became of each: None (it answers) or its error. All end with the
    block.

    Loading and compiling take minutes and run side by side; measuring must not, so ask one server after the
    other.
    """
    try:
        for server in servers:
            server.start()
        yield [_outcome(server) for server in servers]
    finally:
        for server in servers:  # all at once: each takes seconds to end
            server.send(signal.SIGTERM)
        for server in servers:
            server.stop()


def _outcome(server: Server) -> ServerError | None:
    try:
        server.wait_until_ready()
    except ServerError as error:
        return error
    return None


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"  | {line}" for line in lines)


def _no_proxy() -> dict[str, str]:
    """The environment in which a server's own calls to itself do not go through the user's proxy."""
    own = [HOST, "localhost", "::1"]
    names = ("no_proxy", "NO_PROXY")
    return {name: ",".join([*filter(None, [os.environ.get(name)]), *own]) for name in names}


def _private(path: str, flags: int) -> int:
    """Opens a file that other users cannot read."""
    handle = os.open(path, flags, 0o600)
    os.fchmod(handle, 0o600)  # one that was there before keeps its mode otherwise
    return handle


def listens(host: str, port: int) -> bool:
    """Whether somebody listens on the port.

    A client that asks again and again is once given the very port that it asks for, and is connected to
    itself. The server could not take that port for a minute then. So our own end is chosen first.
    """
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.settimeout(5)
                probe.bind(("", 0))
                if probe.getsockname()[1] != port:
                    probe.connect(address)
                    return True
    return False


def answers(url: str) -> bool:
    """Whether `url` gives HTTP 200 within five seconds."""
    try:
        # No proxy: the server is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError):
        return False


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different. InputError if there are not so many."""
    with contextlib.ExitStack() as held:
        free: list[int] = []
        for port in random.SystemRandom().sample(PORTS, len(PORTS)):  # whatever the seed
            probe = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                free.append(port)
            if len(free) == count:
                return free
    raise InputError(
        f"{count} free ports are needed between {PORTS[0]} and {PORTS[-1]}; {len(free)} are free"
    )
