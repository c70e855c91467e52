"""Files that only their owner may read, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from shoal.errors import DiskFull, ShoalError


def make_private(path: Path) -> None:
    """Make a directory and those above it that are missing, each for its owner only (mkdir's `parents` would open the
    ones above to everybody)."""
    if not path.exists():
        make_private(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


def write_private(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write `path` whole or not at all, readable by its owner only from its first moment on. `durable`: it is on the
    disk when this returns; else a crash of the machine may bring back the file that was there before.

    Raises DiskFull or ShoalError when the disk does not take it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        make_private(path.parent)
        partial.unlink(missing_ok=True)  # of an earlier process of this number, killed while it wrote (containers)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> ShoalError:
    """What to raise when the operating system refuses to write `path`."""
    kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else ShoalError
    return kind(f"Cannot write {path}: {error.strerror}.", hint="Free some space there or choose another directory.")
