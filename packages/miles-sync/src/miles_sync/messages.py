"""What sender and receiver say to each other, and in which order.

The receiver's side of a transaction; the sender's calls on the arrows, in its words:

          Begin         Prepare            Attach, Bucket *           Verify            Commit
    IDLE ────────▶ BEGUN ───────▶ PREPARED ────────────────▶ RECEIVING ───────▶ VERIFIED ───────▶ IDLE
     ▲               │               │                           │                 │      version = new
     └───────────────┴───────────────┴───────────────────────────┴─────────────────┘
       Abort, an error, the connection's end, or silence beyond the deadline: weights and version unchanged

- Begin carries the manifest without its digest. The receiver compares it with what it holds and allocates staging.
- Prepare has the receiver's owner check that the tensors fit the weights, changing nothing. Asked for only where
  the layout is new.
- Attach opens the transport; asked for only where it is not open yet.
- Bucket says that a range of the flat buffer is on its way. It is not answered; a failure is answered once, and
  the rest ignored.
- Verify carries the sender's digest; the receiver compares the digest of what it staged.
- Commit alone changes weights. Prepare and Commit may instead reach the receiver through its owner (an engine's
  main loop); they are answered here all the same.
- Every call but Bucket is answered by exactly one Done or Refused that names it; Ask is answered by State.
"""

from __future__ import annotations

import msgspec


class _Tagged(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """A message: its type's name travels with it."""


class Begin(_Tagged, frozen=True):
    """Start a transaction: its name, the encoded manifest, and how long silence is tolerated, in seconds."""

    txn: str
    manifest: bytes
    deadline_s: float


class Prepare(_Tagged, frozen=True):
    """Check that the tensors fit, changing nothing."""

    txn: str


class Attach(_Tagged, frozen=True):
    """Open a transport.

    `kind` "shm": `address` is a segment's name, `nbytes` its length. "gloo": `address` is the store's
    "host port prefix".
    """

    txn: str
    kind: str
    address: str
    nbytes: int


class Bucket(_Tagged, frozen=True):
    """Bytes `start` to `stop` of the flat buffer are on their way."""

    txn: str
    start: int
    stop: int


class Verify(_Tagged, frozen=True):
    """All was sent; this is its digest."""

    txn: str
    digest: str


class Commit(_Tagged, frozen=True):
    """Make the staged weights the served ones."""

    txn: str


class Abort(_Tagged, frozen=True):
    """Forget the transaction."""

    txn: str


class Probe(_Tagged, frozen=True):
    """Can you read this shared-memory segment? Answered by Done whose `detail` is its content, or Refused."""

    segment: str


class Ask(_Tagged, frozen=True):
    """What do you serve? With `recompute`, read the live weights again."""

    recompute: bool


class Done(_Tagged, frozen=True):
    """The call named `call` succeeded."""

    call: str
    txn: str = ""
    detail: str = ""


class Refused(_Tagged, frozen=True):
    """The call named `call` failed with an error of the family named `kind`."""

    call: str
    kind: str
    stage: str
    reason: str


class State(_Tagged, frozen=True):
    """What a receiver serves.

    Attributes:
        receiver: Its name, for messages.
        version: Last committed, or -1 where nothing was committed yet.
        digest: Of the committed transaction, "" where there was none.
        layout: Its layout id; a Begin with the same needs no Prepare.
        attached: Address of the open transport, or "".
        intact: Whether the live weights still are the committed ones; None where not recomputed.
        dirty: Whether a commit failed half-way: the weights may be a mixture until a commit succeeds.
    """

    receiver: str
    version: int
    digest: str
    layout: str
    attached: str
    intact: bool | None
    dirty: bool


Message = Begin | Prepare | Attach | Bucket | Verify | Commit | Abort | Probe | Ask | Done | Refused | State
