"""`python -m shoal.hostile.victim FOLDER`: a gateway and a member of a swarm, to be attacked from another process.

FOLDER holds the member's identity; ports and a key are printed as one line of JSON. Ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path

from shoal.gateway.limits import Limits
from shoal.gateway.server import serve
from shoal.hostile.http import application
from shoal.net.identity import NodeIdentity
from shoal.net.seed import Seed
from shoal.net.tls import TlsTransport


async def main(folder: Path) -> None:
    """Serve with the bounds that users get, until standard input ends."""
    logging.disable(logging.WARNING)
    identity = NodeIdentity.load(folder)
    limits = Limits()
    app, accounts = application(folder, limits)
    key, _ = accounts.create("user")
    listener = await TlsTransport(identity).listen("tcp://127.0.0.1:0", Seed(identity).on_conn)
    async with serve(app, limits=limits) as listening:
        print(json.dumps({"http": listening.port, "swarm": listener.address, "key": key}), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await listener.close()


if __name__ == "__main__":
    try:
        import uvloop
    except ImportError:
        asyncio.run(main(Path(sys.argv[1])))
    else:
        uvloop.run(main(Path(sys.argv[1])))
