"""The control channel: a socket whose two ends hold the same token, and msgpack messages of bounded length.

Handshake (dialer D, listener L, token K; each side proves that it holds K, neither sends it):

    L ─▶ D   magic, nonce_L (32 random bytes)
    D ─▶ L   magic, nonce_D, HMAC(K, "dialer" nonce_L nonce_D)
    L ─▶ D   HMAC(K, "listener" nonce_L nonce_D)        or closes: the tokens differ

Then frames, each way: length (4 bytes), HMAC-SHA256 over direction, sequence number and payload, payload. The
frame key is HMAC(K, "frames" nonce_L nonce_D), so a frame can be neither forged, nor replayed, nor moved.
Nothing is encrypted.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import select
import socket
import threading
import time

import msgspec

from miles_sync.errors import AuthError, DeadlineError, PeerLostError, ProtocolError
from miles_sync.messages import Message

MIN_TOKEN_CHARS = 16
TOKEN_VARIABLE = "MILES_SYNC_TOKEN"
"""The environment variable that gives an engine, or a command, its token."""

MAX_FRAME_BYTES = 1 << 28
"""256 MiB: room for a manifest of a million entries; anything longer is not ours."""

_MAGIC = b"MSYNC\x00\x00\x01"
_NONCE_BYTES = 32
_MAC_BYTES = 32


class Deadline:
    """A point in time that waits are measured against."""

    def __init__(self, seconds: float) -> None:
        """Start the clock: `seconds` from now."""
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left, never below zero."""
        return max(0.0, self._end - time.monotonic())


def check_token(token: str) -> str:
    """Return the token. Raises `ValueError` for one that is too short to be a secret."""
    if len(token) < MIN_TOKEN_CHARS:
        raise ValueError(
            f"token has {len(token)} characters, at least {MIN_TOKEN_CHARS} are needed: "
            "use secrets.token_hex() and give the same to both sides"
        )
    return token


class Channel:
    """One end of an authenticated connection. One thread may receive; any may send.

    Use `accept` or `dial`, which do the handshake.
    """

    def __init__(self, sock: socket.socket, peer: str, key: bytes, *, dialer: bool) -> None:
        """Wrap a socket whose handshake is done; `key` is the frame key."""
        self.peer = peer
        self._sock = sock
        self._key = key
        self._out, self._in = (b"D", b"L") if dialer else (b"L", b"D")
        self._sent = self._received = 0
        self._send_lock = threading.Lock()

    @property
    def local_host(self) -> str:
        """The address under which the peer reaches this process."""
        return self._sock.getsockname()[0]

    def send(self, message: Message, deadline: Deadline, stage: str) -> None:
        """Send one message. Raises `DeadlineError`, `PeerLostError`."""
        payload = msgspec.msgpack.encode(message)
        with self._send_lock:
            frame = len(payload).to_bytes(4, "big") + self._mac(self._out, self._sent, payload)
            self._sent += 1
            try:
                self._sock.settimeout(max(deadline.left(), 0.001))
                self._sock.sendall(frame + payload)
            except TimeoutError as error:
                raise self._late(deadline, stage, "it does not read") from error
            except OSError as error:
                raise self._lost(stage, error) from error

    def poll(self, seconds: float) -> bool:
        """Whether a message, or the end of the connection, can be read within `seconds`."""
        try:
            return bool(select.select([self._sock], [], [], seconds)[0])
        except (OSError, ValueError) as error:  # closed by another thread
            raise self._lost("connect", error) from error

    def receive(self, deadline: Deadline, stage: str) -> Message:
        """Wait for one message. Raises `DeadlineError`, `PeerLostError`, `ProtocolError`."""
        head = self._read(4 + _MAC_BYTES, deadline, stage)
        length = int.from_bytes(head[:4], "big")
        if length > MAX_FRAME_BYTES:
            raise ProtocolError(f"a frame of {length} bytes", stage=stage, peer=self.peer)
        payload = self._read(length, deadline, stage)
        if not hmac.compare_digest(head[4:], self._mac(self._in, self._received, payload)):
            raise ProtocolError("a frame with a wrong MAC", stage=stage, peer=self.peer)
        self._received += 1
        try:
            return msgspec.msgpack.decode(payload, type=Message, strict=True)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolError(f"not a message: {error}", stage=stage, peer=self.peer) from error

    def close(self) -> None:
        """End the connection; the peer sees it at once."""
        with contextlib.suppress(OSError):  # the peer was faster
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _read(self, count: int, deadline: Deadline, stage: str) -> bytes:
        try:
            return _read_exactly(self._sock, count, deadline)
        except TimeoutError as error:
            raise self._late(deadline, stage, "no answer") from error
        except OSError as error:
            raise self._lost(stage, error) from error

    def _mac(self, direction: bytes, sequence: int, payload: bytes) -> bytes:
        head = direction + sequence.to_bytes(8, "big")
        return hmac.digest(self._key, head + payload, "sha256")

    def _late(self, deadline: Deadline, stage: str, what: str) -> DeadlineError:
        return DeadlineError(f"{what} within {deadline.seconds:g} s", stage=stage, peer=self.peer)

    def _lost(self, stage: str, error: Exception) -> PeerLostError:
        return PeerLostError(f"the connection ended ({error})", stage=stage, peer=self.peer)


def listen(host: str, port: int = 0) -> socket.socket:
    """Open a listening socket; port 0 picks a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=16)


def accept(listener: socket.socket, token: str, deadline: Deadline, peer: str) -> Channel:
    """Wait for a dialer and do the handshake.

    Raises `DeadlineError` where nobody comes, `AuthError` where the dialer's token differs, `PeerLostError`.
    """
    try:
        listener.settimeout(max(deadline.left(), 0.001))
        sock, _ = listener.accept()
    except TimeoutError as error:
        reason = f"it did not connect back within {deadline.seconds:g} s"
        raise DeadlineError(reason, stage="connect", peer=peer) from error
    return admit(sock, token, deadline, peer)


def admit(sock: socket.socket, token: str, deadline: Deadline, peer: str) -> Channel:
    """Do the listener's half of the handshake on an accepted socket. Raises like `accept`."""
    ours = secrets.token_bytes(_NONCE_BYTES)
    with _Closing(sock, peer, deadline) as shaking:
        _harden(sock)
        shaking.write(_MAGIC + ours)
        hello = shaking.read(len(_MAGIC) + _NONCE_BYTES + _MAC_BYTES)
        magic, theirs = hello[: len(_MAGIC)], hello[len(_MAGIC) : -_MAC_BYTES]
        if magic != _MAGIC:
            raise ProtocolError("it speaks another protocol", stage="connect", peer=peer)
        _prove(hello[-_MAC_BYTES:], _tag(token, b"dialer", ours, theirs), peer)
        shaking.write(_tag(token, b"listener", ours, theirs))
    return Channel(sock, peer, _tag(token, b"frames", ours, theirs), dialer=False)


def dial(host: str, port: int, token: str, deadline: Deadline, peer: str) -> Channel:
    """Connect to a listener and do the handshake. Raises like `accept`."""
    try:
        sock = socket.create_connection((host, port), timeout=max(deadline.left(), 0.001))
    except TimeoutError as error:
        reason = f"{host}:{port} did not answer within {deadline.seconds:g} s"
        raise DeadlineError(reason, stage="connect", peer=peer) from error
    except OSError as error:
        raise PeerLostError(f"{host}:{port}: {error}", stage="connect", peer=peer) from error
    ours = secrets.token_bytes(_NONCE_BYTES)
    with _Closing(sock, peer, deadline) as shaking:
        _harden(sock)
        hello = shaking.read(len(_MAGIC) + _NONCE_BYTES)
        if hello[: len(_MAGIC)] != _MAGIC:
            raise ProtocolError("it speaks another protocol", stage="connect", peer=peer)
        theirs = hello[len(_MAGIC) :]
        shaking.write(_MAGIC + ours + _tag(token, b"dialer", theirs, ours))
        try:
            proof = shaking.read(_MAC_BYTES)
        except ConnectionError as error:
            raise _refused(peer) from error
        _prove(proof, _tag(token, b"listener", theirs, ours), peer)
    return Channel(sock, peer, _tag(token, b"frames", theirs, ours), dialer=True)


class _Closing:
    """A socket during its handshake: closed on any error, errors named."""

    def __init__(self, sock: socket.socket, peer: str, deadline: Deadline) -> None:
        self._sock, self._peer, self._deadline = sock, peer, deadline

    def __enter__(self) -> _Closing:
        return self

    def read(self, count: int) -> bytes:
        return _read_exactly(self._sock, count, self._deadline)

    def write(self, data: bytes) -> None:
        self._sock.settimeout(max(self._deadline.left(), 0.001))
        self._sock.sendall(data)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        self._sock.close()
        if isinstance(error, TimeoutError):
            reason = f"no handshake within {self._deadline.seconds:g} s"
            raise DeadlineError(reason, stage="connect", peer=self._peer) from error
        if isinstance(error, OSError):
            reason = f"the connection ended in the handshake ({error})"
            raise PeerLostError(reason, stage="connect", peer=self._peer) from error


def _harden(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A peer whose host died sends no FIN: keepalive finds it after 5 + 3 * 5 s of silence.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _read_exactly(sock: socket.socket, count: int, deadline: Deadline) -> bytes:
    data = bytearray()
    while len(data) < count:
        sock.settimeout(max(deadline.left(), 0.001))
        piece = sock.recv(min(count - len(data), 1 << 20))
        if not piece:
            raise ConnectionResetError("closed by the peer")
        data += piece
    return bytes(data)


def _tag(token: str, role: bytes, listener: bytes, dialer: bytes) -> bytes:
    return hmac.digest(token.encode(), role + listener + dialer, "sha256")


def _prove(given: bytes, expected: bytes, peer: str) -> None:
    if not hmac.compare_digest(given, expected):
        raise _refused(peer)


def _refused(peer: str) -> AuthError:
    reason = "the tokens differ: give sender and receiver the same"
    return AuthError(reason, stage="connect", peer=peer)
