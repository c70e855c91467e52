"""A gateway in a process of its own, with a model that needs no weights: `python -m support.metered_gateway FOLDER`.

Prints its URL. The key file in the folder stays, so the next one goes on with it.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from shoal.gateway.limits import Limits
from shoal.gateway.server import serve
from shoal.hostile.http import application


async def main(folder: Path) -> None:
    app, _ = application(folder, Limits())
    async with serve(app) as listening:
        print(listening.url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
