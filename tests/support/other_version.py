"""`python -m support.other_version server-process ...`: a block server of a release with another wire protocol."""

from __future__ import annotations

import sys


def main() -> int:
    """Say another version in every greeting, then be the real command."""
    from shoal.cli.main import run
    from shoal.net import connection

    connection.PROTOCOL_VERSION += 1
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
