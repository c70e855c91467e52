"""`python -m shoal`, and the `shoal` script."""

from __future__ import annotations

import os
import sys
import threading


def main() -> None:
    """Run the command line and leave with its exit code."""
    from shoal.cli.main import run

    code = run(sys.argv[1:])
    if any(thread.daemon for thread in threading.enumerate() if thread is not threading.current_thread()):
        # A compute thread may still be inside the numerical library, loading or in a long batch. When the interpreter
        # is torn down under it, the process aborts; nothing of what such a thread would still do is wanted.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
