"""What sender and receiver say to each other, and in which order.

The receiver's side of a transaction; the sender's calls on the arrows, in its words:

          Begin         Prepare          Attach, Stream            Verify            Commit
    IDLE ────────▶ BEGUN ───────▶ PREPARED ────────────▶ RECEIVED ─────────▶ VERIFIED ───────▶ IDLE
     ▲               │               │                        │                 │      version = new, whole
     └───────────────┴───────────────┴────────────────────────┴─────────────────┘
       Abort, an error, the connection's end, or silence beyond the deadline:
         staged     weights and version unchanged
         in place   unchanged before the first byte was installed; from then on DIRTY: no version is served
                    until a transaction of this version or a newer one has committed

- Begin names layout, mode and bucket length; the manifest comes with it only where the receiver does not know the
  layout. Both sides cut the flat buffer into the same buckets.
- Prepare has the receiver's owner check that the tensors fit the weights, changing nothing. Asked for where the layout
  is new, and before each transaction in place whose owner must be told that its weights are about to change.
- Attach opens the transport; asked for only where it is not open yet.
- Stream says that all buckets follow, in order, without another word. It is not answered; a failure is answered
  once. Filled, where the transport shares memory, says how far that is filled; it comes after Stream.
- In staged mode buckets are kept until Commit, which alone changes weights. In place each is installed as it arrives.
- Verify carries the sender's digest; the receiver compares the digest of what arrived.
- Prepare and Commit may instead reach the receiver through its owner (an engine's main loop); they are answered here
  all the same.
- Every call but Stream and Filled is answered by exactly one Done or Refused that names it; Ask is answered by State.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Mode = Literal["staged", "in_place"]


class _Tagged(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """A message: its type's name travels with it."""


class Begin(_Tagged, frozen=True):
    """Start a transaction.

    Attributes:
        txn: Its name.
        version: Of the weights.
        layout: Id of the manifest's layout.
        manifest: Encoded, or empty where the receiver's state named this layout.
        mode: What happens to buckets as they arrive.
        bucket_bytes: Where the flat buffer is cut.
        digest: Whether the bytes are digested.
        deadline_s: How long silence is tolerated, in seconds.
    """

    txn: str
    version: int
    layout: str
    manifest: bytes
    mode: Mode
    bucket_bytes: int
    digest: bool
    deadline_s: float


class Prepare(_Tagged, frozen=True):
    """Check that the tensors fit, changing nothing."""

    txn: str


class Attach(_Tagged, frozen=True):
    """Open a transport: its kind, its address, and what else it needs (see `miles_sync.transports`)."""

    txn: str
    kind: str
    address: str
    detail: bytes


class Stream(_Tagged, frozen=True):
    """All buckets follow."""

    txn: str


class Filled(_Tagged, frozen=True):
    """The memory that the transport shares holds the first `nbytes` of the flat buffer."""

    txn: str
    nbytes: int


class Verify(_Tagged, frozen=True):
    """All was sent; this is its digest."""

    txn: str
    digest: str


class Commit(_Tagged, frozen=True):
    """Make these weights the served ones."""

    txn: str


class Abort(_Tagged, frozen=True):
    """Forget the transaction."""

    txn: str


class Probe(_Tagged, frozen=True):
    """Can you read this segment of shared memory? Answered by Done whose `detail` is its content, or Refused."""

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
        layout: Id of the layout that it knows and was checked against.
        attached: Address of the open transport, or "".
        intact: Whether the live weights still are the committed ones; None where not recomputed.
        dirty: Whether the weights may be a mixture: a transaction ended half-way in place or in its commit.
        device: Where it wants bytes: "cpu", or the UUID of a GPU.
        devices: UUIDs of all GPUs that its process sees.
        nccl: Why it cannot use NCCL; "" where it can.
    """

    receiver: str
    version: int
    digest: str
    layout: str
    attached: str
    intact: bool | None
    dirty: bool
    device: str
    devices: tuple[str, ...]
    nccl: str


Message = Begin | Prepare | Attach | Stream | Filled | Verify | Commit | Abort | Probe | Ask | Done | Refused | State
