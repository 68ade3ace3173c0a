"""The page on a port: of this machine alone unless told otherwise, and with nothing from elsewhere."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mlviews.errors import listing

PORTS = range(7860, 7960)
"""The ports that are tried if none is asked for."""

LOCAL = ("127.0.0.1", "localhost")
"""The names of this machine that do not lead to it from elsewhere."""

POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'none'; base-uri 'self'; "
    "frame-ancestors 'none'; object-src 'none'"
)
"""What a browser may load for the page: nothing from another address."""

Message = MutableMapping[str, Any]


class Policy:
    """Adds the policy to every answer of an ASGI application."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Answer a request."""

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"content-security-policy", POLICY.encode())]
                headers += [(b"referrer-policy", b"no-referrer"), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def application(host: str) -> FastAPI:
    """Return an application that the page is mounted on.

    On a host of this machine alone it answers requests by that name only: a page of elsewhere cannot have its
    own name lead here (DNS rebinding).
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Policy)
    if host in LOCAL:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOCAL))
    return app


def bound(host: str, port: int | None) -> socket.socket:
    """Return a socket that listens on a port.

    Args:
        host: the address to listen on.
        port: None: the first free one from 7860 on; 0: any free one.

    Raises:
        OSError: if the port is in use, or the address is none of this machine's.
    """
    ports = PORTS if port is None else [port]
    for candidate in ports:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
            listener.listen(128)
            return listener
        except (OSError, OverflowError) as error:
            listener.close()
            if not isinstance(error, OSError) or error.errno != errno.EADDRINUSE:
                raise OSError(f"Cannot listen on {host}, port {candidate} ({error}).") from None
    tried = listing([ports[0]]) if len(ports) == 1 else f"{ports[0]} to {ports[-1]}"
    raise OSError(f"Port {tried} is in use: choose another one with --port.")


def directions(host: str, port: int) -> str:
    """Return where the page is, and how to see it from another machine."""
    if host not in LOCAL:
        return (
            f"http://{socket.gethostname()}:{port}\n"
            f"Anyone who can reach this machine on {host} can use it: there is no password."
        )
    return (
        f"http://{host}:{port}\n"
        "It answers on this machine only. From another one, open a tunnel, then the same address there:\n"
        f"    ssh -L {port}:127.0.0.1:{port} {socket.gethostname()}"
    )


class Server:
    """A server in a thread; as a context it stops at the block's end.

    Args:
        app: the application.
        listener: the socket that it listens on.
    """

    def __init__(self, app: FastAPI, listener: socket.socket) -> None:
        self.listener = listener
        config = uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)

    @property
    def port(self) -> int:
        """The port."""
        return int(self.listener.getsockname()[1])

    def run(self) -> None:
        """Serve until the process is interrupted."""
        self._server.run([self.listener])

    def __enter__(self) -> Server:
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            self._thread.join(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)
