"""The command that travels inside SGLang's own request, and SGLang's envelope around it.

POST /update_weights_from_tensor carries, per tensor-parallel rank, a pickle of [(name, tensor), ...]; the
engine unpickles it with an allow-list of modules, calls `tensor.to(device)`, and hands the list to the loader.
Nothing else reaches a loader, so the command is the name of one empty tensor. The pickle is written out by
hand, opcode by opcode: it needs neither sglang nor a pickled storage, and the only thing it can make the engine
call is `torch.empty(0)`.

The command says what to do, where to connect and for which transaction. It holds no secret and grants nothing: the
engine proves the token to the sender and the sender to the engine on the channel that the engine then opens.
"""

from __future__ import annotations

import base64

import msgspec

MAX_COMMAND_BYTES = 4096


class Attend(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Connect to the sender at `host`:`port` and listen to it."""

    host: str
    port: int
    deadline_s: float


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Carry out "prepare" or "commit" of a transaction, here and now, on the engine's main loop."""

    what: str
    txn: str


class Idle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Nothing to do: for ranks that an order does not concern, and to hear that all main loops have come this far."""


Command = Attend | Order | Idle


def envelope(command: Command) -> str:
    """Wrap a command the way SGLang wants `serialized_named_tensors`: base64 of a pickle."""
    name = msgspec.json.encode(command)
    if len(name) > MAX_COMMAND_BYTES:
        raise ValueError(f"a command of {len(name)} bytes, at most {MAX_COMMAND_BYTES}")
    opcodes = (
        b"\x80\x02",  # protocol 2
        b"]",  # []
        b"X" + len(name).to_bytes(4, "little") + name,  # the command, a str
        b"ctorch\nempty\n",  # torch.empty
        b"K\x00\x85R",  # called with (0,)
        b"\x86",  # (command, tensor)
        b"a.",  # appended to the list; done
    )
    return base64.b64encode(b"".join(opcodes)).decode()


def opened(name: str) -> Command:
    """Read a command inside the engine. Raises `ValueError` for anything else."""
    if len(name) > MAX_COMMAND_BYTES:
        raise ValueError(f"a name of {len(name)} characters is no command")
    try:
        return msgspec.json.decode(name, type=Command, strict=True)
    except msgspec.DecodeError as error:
        raise ValueError(f"not a command of miles-sync: {error}") from error
