"""Serving a receiver: a listening socket and a thread, for weights that no engine owns."""

from __future__ import annotations

import logging
import socket
import threading

from miles_sync.channel import Deadline, admit, check_token, listen
from miles_sync.errors import SyncError
from miles_sync.receivers import Receiver
from miles_sync.staging import Staging

_log = logging.getLogger(__name__)

_HANDSHAKE_S = 10.0


class ReceiverServer:
    """Accepts senders for one receiver until closed. Made by `serve`.

    Attributes:
        host: Where it listens.
        port: Where it listens.
    """

    def __init__(self, staging: Staging, token: str, listener: socket.socket) -> None:
        """Take an open listener and start accepting."""
        self.host, self.port = listener.getsockname()[:2]
        self._staging = staging
        self._token = token
        self._listener = listener
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="miles-sync-serve", daemon=True)
        self._thread.start()

    @property
    def version(self) -> int:
        """The version last committed, -1 where none was."""
        return self._staging.version

    @property
    def dirty(self) -> bool:
        """Whether the weights may be a mixture of two versions: they must not be served."""
        return self._staging.dirty

    def wait(self, seconds: float | None = None) -> None:
        """Block until `close`, or for `seconds`."""
        self._closing.wait(seconds)

    def close(self) -> None:
        """Stop accepting, and end the transaction in flight, if any."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._listener.close()
        self._staging.hang_up()
        self._thread.join(timeout=_HANDSHAKE_S)

    def __enter__(self) -> ReceiverServer:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()

    def _accept(self) -> None:
        self._listener.settimeout(0.2)  # a closed listener does not wake an accept that waits for ever
        while not self._closing.is_set():
            try:
                sock, address = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            # One thread per connection: a second sender must hear that the receiver is busy.
            peer = f"{address[0]}:{address[1]}"
            threading.Thread(target=self._converse, args=(sock, peer), name=f"miles-sync-{peer}", daemon=True).start()

    def _converse(self, sock: socket.socket, peer: str) -> None:
        try:
            channel = admit(sock, self._token, Deadline(_HANDSHAKE_S), peer)
        except SyncError as error:
            _log.warning("refused a connection: %s", error)
            return
        self._staging.serve(channel, _HANDSHAKE_S)


def serve(
    receiver: Receiver,
    *,
    token: str,
    host: str = "127.0.0.1",
    port: int = 0,
    name: str = "receiver",
) -> ReceiverServer:
    """Let senders that hold `token` update a receiver's weights, from a thread of this process.

    Args:
        receiver: Whose weights change: in a commit, or in place as they arrive; see `ModuleReceiver.serving`.
        token: The secret that both sides share, at least 16 characters.
        host: Address to listen on; loopback unless you ask for more.
        port: 0 picks a free one.
        name: For messages and errors.

    Returns:
        The running server, with its `host` and `port`; close it when done.
    """
    staging = Staging(receiver, name)
    return ReceiverServer(staging, check_token(token), listen(host, port))
