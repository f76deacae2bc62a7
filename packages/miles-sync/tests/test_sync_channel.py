"""The control channel: who may speak, and what is not listened to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from miles_sync.channel import Channel, Deadline, accept, dial, listen
from miles_sync.errors import AuthError, DeadlineError, PeerLostError, ProtocolError, SyncError
from miles_sync.messages import Abort, Ask

TOKEN = "a token of some length"


def _pair(listener_token: str = TOKEN, dialer_token: str = TOKEN) -> tuple[Channel | SyncError, Channel | SyncError]:
    """Both ends of a handshake, or what each raised."""
    results: dict[str, Channel | SyncError] = {}
    with listen("127.0.0.1") as listener:
        port = listener.getsockname()[1]

        def run(side: str, act: Callable[[], Channel]) -> None:
            try:
                results[side] = act()
            except SyncError as error:
                results[side] = error

        thread = threading.Thread(
            target=run, args=("listener", lambda: accept(listener, listener_token, Deadline(5), "dialer"))
        )
        thread.start()
        run("dialer", lambda: dial("127.0.0.1", port, dialer_token, Deadline(5), "listener"))
        thread.join()
    return results["listener"], results["dialer"]


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    """Both ends, open."""
    one, other = _pair()
    assert isinstance(one, Channel) and isinstance(other, Channel)
    yield one, other
    one.close()
    other.close()


def test_messages_arrive_both_ways(channels: tuple[Channel, Channel]) -> None:
    one, other = channels
    one.send(Abort("x"), Deadline(5), "abort")
    assert other.poll(5) and other.receive(Deadline(5), "abort") == Abort("x")
    other.send(Ask(True), Deadline(5), "status")
    assert one.receive(Deadline(5), "status") == Ask(True)


def test_different_tokens_are_refused_on_both_sides() -> None:
    for result in _pair(dialer_token="another token, as long"):
        assert isinstance(result, AuthError)
    for result in _pair(dialer_token=""):
        assert isinstance(result, AuthError)


def test_silence_ends_at_the_deadline(channels: tuple[Channel, Channel]) -> None:
    one, _other = channels
    with pytest.raises(DeadlineError, match="no answer within"):
        one.receive(Deadline(0.05), "verify")
    with listen("127.0.0.1") as listener, pytest.raises(DeadlineError, match="did not connect back"):
        accept(listener, TOKEN, Deadline(0.05), "an engine")


def test_a_mute_dialer_ends_at_the_deadline() -> None:
    with (
        listen("127.0.0.1") as listener,
        socket.create_connection(listener.getsockname()),
        pytest.raises(DeadlineError, match="no handshake"),
    ):
        accept(listener, TOKEN, Deadline(0.05), "someone")


def test_a_stranger_is_told_apart() -> None:
    with listen("127.0.0.1") as listener, socket.create_connection(listener.getsockname()) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n" + b"x" * 100)
        with pytest.raises(ProtocolError, match="another protocol"):
            accept(listener, TOKEN, Deadline(5), "someone")


def test_a_closed_peer_is_lost(channels: tuple[Channel, Channel]) -> None:
    one, other = channels
    other.close()
    with pytest.raises(PeerLostError):
        one.receive(Deadline(5), "transfer")


@pytest.mark.parametrize("position", [5, 40])
def test_forged_frames_are_refused(channels: tuple[Channel, Channel], position: int) -> None:
    one, other = channels
    frame = bytearray(_captured(one, other))
    frame[position] ^= 1  # in the MAC, in the payload
    one._sock.sendall(frame)
    with pytest.raises(ProtocolError, match="wrong MAC"):
        other.receive(Deadline(5), "transfer")


def test_replayed_and_reflected_frames_are_refused(channels: tuple[Channel, Channel]) -> None:
    one, other = channels
    frame = _captured(one, other)
    one._sock.sendall(frame + frame)
    assert other.receive(Deadline(5), "transfer") == Abort("x")
    with pytest.raises(ProtocolError, match="wrong MAC"):
        other.receive(Deadline(5), "transfer")
    other._sock.sendall(frame)
    with pytest.raises(ProtocolError, match="wrong MAC"):
        one.receive(Deadline(5), "transfer")


def test_endless_frames_are_refused_before_they_are_read(channels: tuple[Channel, Channel]) -> None:
    one, other = channels
    one._sock.sendall(b"\xff" * 36)
    with pytest.raises(ProtocolError, match="frame of"):
        other.receive(Deadline(5), "transfer")


def _captured(one: Channel, other: Channel) -> bytes:
    one.send(Abort("x"), Deadline(5), "abort")
    return other._sock.recv(4096)
