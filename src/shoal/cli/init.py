"""`shoal init`: a new swarm's authorities and its admin, on the machine that will admit the others."""

from __future__ import annotations

from pathlib import Path

import click

from shoal.cli import output


@click.command("init")
@click.option("--name", required=True, help="Name of the swarm, for example bank: part of every certificate.")
@click.option(
    "--swarm-dir",
    type=click.Path(path_type=Path),
    default=None,
    help="Where its keys lie; default: SHOAL_SWARM_DIR, else ~/.local/share/shoal/swarm.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def init(name: str, swarm_dir: Path | None, as_json: bool) -> None:
    """Make a new swarm: its authorities and its admin's identity."""
    import hashlib

    from shoal.net.home import Home, home_path
    from shoal.net.identity import ders_of

    home = Home.create(home_path(swarm_dir), name)
    (root_der,) = ders_of(home.root_pem)
    fingerprint = hashlib.sha256(root_der).hexdigest()
    if as_json:
        output.answer_json(
            {
                "swarm": home.read().swarm,
                "swarm_dir": str(home.path),
                "root_sha256": fingerprint,
                "root_key": str(home.ca_dir / "ca.key"),
                "admin": home.node("admin").peer.node,
            }
        )
        return
    output.answer(
        f"The swarm {home.read().swarm} is made.\n\n"
        f"  directory  {home.path}\n  root       SHA-256 {fingerprint}\n\n"
        "Whoever has this directory decides who is a member: keep it private, and back it up.\n"
        f"The root's key is needed about once in two months. Move {home.ca_dir / 'ca.key'} to a safe place,\n"
        "and back for a moment when `shoal admin` asks for it.\n\n"
        "Next: `shoal admin` here, then `shoal invite` for every machine that joins."
    )
