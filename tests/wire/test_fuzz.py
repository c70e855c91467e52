"""Mutated frames, metadata and bodies: the only outcomes are a valid message, ProtocolError or Refused (NotFinite for
the contents of a tensor), in bounded memory. Seeded, so a failure repeats."""

from __future__ import annotations

import random
import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.messages import samples, step

from shoal.errors import NotFinite, ProtocolError, Refused
from shoal.wire import codec, tensors
from shoal.wire.frames import FrameReader, FrameWriter, Lane, Limits
from shoal.wire.messages import Journal, Result, Step, Tensor

LIMITS = Limits(max_body_bytes=256 * 1024)
INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xC1, 0xDD, 0xFE, 0xFF)


def stream(rng: random.Random) -> bytes:
    """Valid bytes of a few messages, some of them fragmented."""
    writer = FrameWriter()
    for message, body in rng.sample(samples(), rng.randint(1, 4)):
        kind, meta = codec.encode(message)
        writer.push(kind, meta, [body], lane=codec.lane(message))
    if rng.random() < 0.1:
        message, body = step(300)
        writer.push(*codec.encode(message), [body], lane=Lane.BULK)
    return b"".join(b"".join(buffers) for buffers in iter(writer.next_frame, None))


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Flip, overwrite, cut out, repeat or insert, mostly near the front where headers and metadata are."""
    mutated = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = min(int(rng.expovariate(1 / 60)), len(mutated) - 1)
        match rng.randrange(5):
            case 0:
                mutated[at] ^= 1 << rng.randrange(8)
            case 1:
                mutated[at] = rng.choice(INTERESTING)
            case 2:
                del mutated[at : at + rng.randint(1, 8)]
            case 3:
                mutated[at:at] = mutated[at : at + rng.randint(1, 40)]
            case _:
                mutated[at:at] = rng.randbytes(rng.randint(1, 8))
        if not mutated:
            return b"\0"
    return bytes(mutated)


def read(rng: random.Random, data: bytes) -> str:
    """Feed `data` in random pieces; what came of it."""
    reader = FrameReader(codec.decode, LIMITS)
    at = 0
    try:
        while at < len(data):
            size = rng.choice((1, 7, 64, 100_000))
            for frame in reader.feed(data[at : at + size]):
                if isinstance(frame.message, Step | Result | Journal):
                    tensors.decode(frame.message.tensor, frame.body)
            at += size
    except (ProtocolError, Refused, NotFinite) as error:
        return type(error).__name__
    return "read"


def test_twenty_thousand_mutated_streams_raise_nothing_else() -> None:
    rng = random.Random(20_261_122)
    outcomes = [read(rng, mutate(rng, stream(rng))) for _ in range(20_000)]
    # All of them must occur, else the mutations do not reach what they should.
    assert {"read", "ProtocolError", "Refused", "NotFinite"} == set(outcomes)
    assert outcomes.count("ProtocolError") > 5_000


def test_hostile_streams_cost_bounded_memory() -> None:
    rng = random.Random(7)
    streams = [mutate(rng, stream(rng)) for _ in range(1_000)]
    tracemalloc.start()
    try:
        for data in streams:
            read(rng, data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(Lane) * LIMITS.max_body_bytes + 2**20


@given(st.sampled_from(sorted(codec.KINDS)) | st.integers(0, 255), st.binary(max_size=200), st.integers(0, 2**64 - 1))
def test_metadata_of_any_bytes(kind: int, meta: bytes, body_len: int) -> None:
    try:
        message = codec.decode(kind, meta, body_len)
    except ProtocolError:
        return
    assert codec.encode(message)[0] == kind


@given(st.builds(Tensor, st.sampled_from(["f32", "bf16", "int8"]), st.integers(0, 4), st.integers(1, 130)), st.data())
def test_bodies_of_any_bytes(tensor: Tensor, data: st.DataObject) -> None:
    size = tensors.body_bytes(tensor)
    body = data.draw(st.binary(max_size=size + 1) | st.binary(min_size=size, max_size=size))
    try:
        values = tensors.decode(tensor, body)
    except (ProtocolError, NotFinite):
        return
    assert np.isfinite(values).all()
