"""Every message that crosses a machine border, with its bounds. docs/protocol.md describes them for other teams.

A message is a msgspec struct sent as a msgpack array; unknown tags, unknown fields and wrong types are refused by the
decoder. Tensors never travel inside a message: they are the raw body of the same frame, described by `Tensor`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

PROTOCOL_VERSION = 2

MAX_META_BYTES = 64 * 1024
MAX_BODY_BYTES = 256 * 1024 * 1024
"""No frame body may be larger; a Transport may be given a smaller budget."""
MAX_ITEMS = 1024
"""Rows of at most this many sessions share one frame."""
MAX_ROWS = 65_536
MAX_HIDDEN = 65_536
MAX_CONTEXT = 16 * 1024 * 1024
MAX_REVOKED = 1000
MAX_SIGNED_BYTES = 40_000
"""Room for a revocation list of MAX_REVOKED nodes; a record takes far less (swarm.view.MAX_RECORD_BYTES)."""

SessionBytes = Annotated[bytes, Meta(min_length=16, max_length=16)]
NodeText = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9._-]*$")]
NameText = Annotated[str, Meta(max_length=256)]
ReasonText = Annotated[str, Meta(max_length=1024)]
NoteText = Annotated[str, Meta(max_length=256)]
AddressText = Annotated[str, Meta(min_length=1, max_length=256)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Position = Annotated[int, Meta(ge=0, le=MAX_CONTEXT)]
BlockIndex = Annotated[int, Meta(ge=0, le=100_000)]
Millis = Annotated[float, Meta(ge=0.0, le=1e9)]

DigestKey = Annotated[bytes, Meta(min_length=8, max_length=8)]
"""A node in a digest: the first 8 bytes of the SHA-256 of its id."""
DerBytes = Annotated[bytes, Meta(min_length=1, max_length=4096)]
"""One certificate."""
ChainDer = Annotated[list[DerBytes], Meta(max_length=4)]
"""A node's certificate and those between it and the swarm's root, which is not among them."""

WireType = Literal["f32", "bf16", "int8"]
"""How activations travel: raw float32, raw bfloat16, or blockwise int8 (one float32 scale per 64 values)."""


class Tensor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Describes the body of a frame: [rows, width] activations in row-major order, little-endian."""

    dtype: WireType
    rows: Annotated[int, Meta(ge=0, le=MAX_ROWS)]
    width: Annotated[int, Meta(ge=1, le=MAX_HIDDEN)]


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    pass


class Hello(_Message, frozen=True, tag=1):
    """First message in both directions. A connection counts as made only once the other side's Hello has arrived."""

    protocol: int
    swarm: NameText
    node: NodeText
    role: Literal["server", "client", "gateway", "admin"]


class Ping(_Message, frozen=True, tag=2):
    """Answered by the network loop, never behind compute."""

    nonce: Count


class Pong(_Message, frozen=True, tag=3):
    nonce: Count


class Fault(_Message, frozen=True, tag=4):
    """Why the sender is about to close, or why one request failed. Carries a code, never a path or a traceback."""

    code: NameText
    message: ReasonText
    retry_after_s: Annotated[float, Meta(ge=0.0, le=86_400.0)] | None = None


class Hop(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a server pushes a session's output: another server."""

    node: NodeText
    addresses: Annotated[list[AddressText], Meta(min_length=1, max_length=8)]


class Open(_Message, frozen=True, tag=10):
    """Driver -> server: host this session on blocks start:end, reserve room for max_tokens, push outputs to `next`
    (None: this is the last stage, return them to the driver). `epoch` grows with every re-plan of the session."""

    session: SessionBytes
    epoch: Count
    model: NameText
    start: BlockIndex
    end: BlockIndex
    stages: Annotated[int, Meta(ge=1, le=1024)]
    """How many servers the chain has; the server sizes its batches so that all of them stay busy."""
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_CONTEXT)]
    wire: WireType
    next: Hop | None
    forward_from: Position = 0
    """Outputs below this position are not sent on: the next stage has them already (a replay rebuilds this cache)."""
    journal_from: Position = 0
    """Likewise for the copies to the driver's journal."""


class Opened(_Message, frozen=True, tag=11):
    session: SessionBytes
    epoch: Count


class Denied(_Message, frozen=True, tag=12):
    """Answer to Open or Relink. code: full, unknown_model, blocks_not_hosted, draining, stale_epoch,
    unknown_session."""

    session: SessionBytes
    epoch: Count
    code: NameText
    message: ReasonText
    retry_after_s: Annotated[float, Meta(ge=0.0, le=86_400.0)]


class StepItem(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`rows` consecutive tokens of one session, the first of them at `position`; its rows follow those of the items
    before it in the body. Items of a session are processed in the order of position; a duplicate is harmless."""

    session: SessionBytes
    position: Position
    rows: Annotated[int, Meta(ge=1, le=MAX_ROWS)]
    block: BlockIndex = 0
    """The block these rows are inputs of (the number of blocks: they are the model's outputs). After a re-plan with
    other cuts, late rows of the earlier chain may reach a server that now begins elsewhere; this tells them apart."""


class Step(_Message, frozen=True, tag=13):
    """Inputs of a stage: driver -> first server, or server -> next server."""

    items: Annotated[list[StepItem], Meta(min_length=1, max_length=MAX_ITEMS)]
    tensor: Tensor


class Result(_Message, frozen=True, tag=14):
    """Last server -> driver: outputs of the last block."""

    items: Annotated[list[StepItem], Meta(min_length=1, max_length=MAX_ITEMS)]
    tensor: Tensor


class Journal(_Message, frozen=True, tag=15):
    """Every other server -> driver, off the critical path: the outputs it pushed on, which are the next stage's
    inputs. `block` is the index of the first block that takes them."""

    block: BlockIndex
    items: Annotated[list[StepItem], Meta(min_length=1, max_length=MAX_ITEMS)]
    tensor: Tensor


class Relink(_Message, frozen=True, tag=16):
    """Driver -> server: push this session's outputs to `next` from now on."""

    session: SessionBytes
    epoch: Count
    next: Hop | None


class Relinked(_Message, frozen=True, tag=17):
    """`position`: the first position whose output goes to the new next hop; all below went to the old one."""

    session: SessionBytes
    epoch: Count
    position: Position


class Close(_Message, frozen=True, tag=18):
    """Driver -> server: forget these sessions now (finished, cancelled or moved elsewhere)."""

    sessions: Annotated[list[SessionBytes], Meta(min_length=1, max_length=MAX_ITEMS)]


class Gone(_Message, frozen=True, tag=19):
    """Server -> driver: these sessions no longer live here. code: next_lost (the push link broke; the cache is kept
    until closed), draining, left, expired, failed, not_finite, out_of_order."""

    sessions: Annotated[list[SessionBytes], Meta(min_length=1, max_length=MAX_ITEMS)]
    code: NameText
    message: ReasonText


class Span(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One model's consecutive blocks on one server."""

    model: NameText
    start: BlockIndex
    end: BlockIndex


class AuditHead(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a node's audit log stands. Others keep it, so that a log cut short later is noticed."""

    seq: Count
    hash: Annotated[bytes, Meta(min_length=32, max_length=32)]


class Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one node says about itself. One writer per node: the higher (incarnation, version) wins. It is valid for
    lease_s seconds after it was last heard to grow; lease times are measured on the receiver's clock only. It travels
    inside a Signed."""

    node: NodeText
    incarnation: Count
    version: Count
    lease_s: Annotated[float, Meta(gt=0.0, le=3600.0)]
    role: Literal["server", "client", "gateway", "admin"]
    state: Literal["joining", "loading", "online", "draining", "resting", "gone"]
    """resting: a borrowed machine whose owner needs it; it hosts nothing and comes back by itself."""
    addresses: Annotated[list[AddressText], Meta(max_length=8)]
    span: Span | None
    pid: Count
    dtype: Literal["float32", "bfloat16", "float16"]
    decode_ms_per_block: Millis
    """Time of one block for one row, measured on this machine (probe at first, then real traffic)."""
    prefill_ms_per_block_token: Millis
    memory_bytes: Count
    """What this node offers for weights and caches together."""
    cache_tokens_free: Count
    cache_tokens_total: Count
    queue_rows: Count
    """Rows waiting for compute when the record was written."""
    sessions: Count
    labels: Annotated[list[NameText], Meta(max_length=16)] = []
    wire_error: Annotated[float, Meta(ge=0.0, le=1e9)] = 0.0
    """What the wire format cost lately: ||sent - computed|| / ||computed|| of one batch's outputs, 0 when lossless."""
    serves: NameText = ""
    """The model whose blocks this server chooses itself, also while it hosts none; "": they were given to it."""
    reason: NoteText = ""
    """Why it hosts what it hosts, or nothing, in a sentence for `shoal status --explain`."""
    rtts: Annotated[list[tuple[NodeText, Millis]], Meta(max_length=32)] = []
    """Round trips to other nodes, milliseconds, measured by this node's own connections."""
    busy: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    """Share of the last ~10 s spent computing."""
    threads: Count = 1
    """Threads it computes with."""
    weights: Literal["native", "int8", "nf4"] = "native"
    """In which precision it holds the weights; "native": as they are in the checkpoint, rounded to `dtype`. With
    `dtype` it says how far this server's numbers may be from another's: one that is further off declared falsely."""
    audit: AuditHead | None = None
    quarantined: Annotated[list[NodeText], Meta(max_length=32)] = []
    """Of a gateway: servers whose answers it found wrong, and which it gives nothing. Others avoid whom enough gateways
    name (swarm.honesty.named)."""


class Beat(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The record of this node that has the number (incarnation, base) still holds, and now has the number
    (incarnation, version): a renewed lease at a fifth of the bytes. Inside a Signed."""

    node: NodeText
    incarnation: Count
    base: Count
    version: Count


class Revocations(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """All nodes whose certificates no longer count. Written by an admin; the highest version wins. Inside a Signed."""

    version: Count
    nodes: Annotated[list[NodeText], Meta(max_length=MAX_REVOKED)]


class Signed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The msgpack bytes of a Record, a Beat or Revocations, with the writer's signature over exactly these bytes (ECDSA
    P-256, SHA-256, DER). Opaque to the frame decoder: what a third node wrote cannot end the connection of the node
    that passes it on."""

    payload: Annotated[bytes, Meta(min_length=1, max_length=MAX_SIGNED_BYTES)]
    signature: Annotated[bytes, Meta(min_length=1, max_length=128)]
    chain: ChainDer = []
    """The writer's certificates; left out when the receiver has seen a record of that node and incarnation, and with
    a Beat."""
    age_ms: Count = 0
    """How long ago the sender saw this record grow. Not signed: it can shorten a lease by half at most."""


class Sync(_Message, frozen=True, tag=30):
    """Push-pull gossip. `digest` maps each known node to [incarnation, version]; `records` are those the sender thinks
    the receiver lacks. `answers` is how many more messages the round may have: 2 when it is opened, 1 in an answer that
    asks back, 0 in the last one. The receiver answers unless it is 0. The digest of a message that asks for no answer
    holds only what its sender knows of and does not send (any more)."""

    digest: dict[DigestKey, tuple[Count, Count]]
    records: Annotated[list[Signed], Meta(max_length=2048)]
    answers: Annotated[int, Meta(ge=0, le=2)]
    revocations: Signed | None = None
    """Sent alone, to a receiver whose `revoked_version` is lower."""
    revoked_version: Count = 0
    """Version of the sender's revocation list, 0 for none."""
    more: bool = False
    """The receiver lacks more than had room: it may open another round at once."""
    beats: Annotated[list[Signed], Meta(max_length=2048)] = []
    """Renewed leases of nodes whose record the receiver has, or gets in this very message."""


class Assign(_Message, frozen=True, tag=31):
    """Admin -> server without blocks: load these."""

    span: Span
    reason: ReasonText


class Drain(_Message, frozen=True, tag=32):
    """Admin -> server: leave politely, as on a stop signal."""

    reason: ReasonText


class Draining(_Message, frozen=True, tag=33):
    """Server -> admin: it has begun to leave."""


class Renew(_Message, frozen=True, tag=40):
    """Any node -> a node that keeps the swarm's issuer: a new certificate for the key of this connection, please."""


class Renewed(_Message, frozen=True, tag=41):
    """The new certificate of the node at the other end, for the same key, and its issuer's."""

    chain: Annotated[list[DerBytes], Meta(min_length=1, max_length=4)]


Message = (
    Hello
    | Ping
    | Pong
    | Fault
    | Open
    | Opened
    | Denied
    | Step
    | Result
    | Journal
    | Relink
    | Relinked
    | Close
    | Gone
    | Sync
    | Assign
    | Drain
    | Draining
    | Renew
    | Renewed
)
