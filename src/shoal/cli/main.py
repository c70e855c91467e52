"""The command line: which commands there are, and how every one of them ends.

Exit codes: 0 fine, 1 failure, 2 usage, 3 the answer is no, 4 refused, 5 full, 130 interrupted. An error that shoal
raises on purpose, or that this machine gives (a full disk), is two lines on stderr (with --json one object on stdout);
any other exception is a bug in shoal and keeps its traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

import click

from shoal import __version__
from shoal.cli import output
from shoal.cli.lazy import Entry, LazyGroup
from shoal.errors import ShoalError

COMMANDS: dict[str, Entry] = {
    "up": Entry("shoal.cli.up:up", "Run a private swarm on this machine until Ctrl-C."),
    "init": Entry("shoal.cli.init:init", "Make a new swarm: its authorities and its admin's identity."),
    "admin": Entry("shoal.cli.admin:admin", "Let machines into the swarm, renew their certificates, spread removals."),
    "invite": Entry("shoal.cli.invite:invite", "Print a token with which one machine may join, once."),
    "revoke": Entry("shoal.cli.revoke:revoke", "Throw a node out: its connections are cut within seconds, for good."),
    "join": Entry("shoal.cli.join:join", "Host blocks of a model for a swarm, until Ctrl-C."),
    "drain": Entry(
        "shoal.cli.drain:drain", "Ask a server to leave: it hands its sessions over, or finishes them, and ends."
    ),
    "status": Entry("shoal.cli.status:status", "Show who hosts which blocks; exit code 3 when some are missing."),
    "gateway": Entry("shoal.cli.gateway:gateway", "Answer the API for a swarm until Ctrl-C."),
    "keys": Entry("shoal.cli.keys:keys", "API keys of this machine's gateway."),
    "audit": Entry("shoal.cli.audit:audit", "Look into the log of who computed what."),
    "generate": Entry("shoal.cli.generate:generate", "Continue a text with the running swarm."),
    "plan": Entry("shoal.cli.plan:plan", "What models need, calculated before anything is bought."),
    "doctor": Entry(
        "shoal.cli.doctor:doctor", "Look for what keeps shoal from working here; exit code 3 when something does."
    ),
    "bench": Entry("shoal.cli.bench:bench", "Measure shoal on this machine."),
    "server-process": Entry(
        "shoal.cli.server_process:server_process",
        "Host some blocks of a model (started by `shoal up`).",
        process=True,
    ),
    "gateway-process": Entry(
        "shoal.cli.gateway_process:gateway_process",
        "Answer the API for a swarm (started by `shoal up`).",
        process=True,
    ),
}

shoal = LazyGroup(
    name="shoal",
    table=COMMANDS,
    help="Run one large language model over many ordinary machines.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
click.version_option(__version__, prog_name="shoal", message="%(prog)s %(version)s")(shoal)

# What the operating system may refuse in any command, and what the person at the machine can do about it.
MACHINE_HINTS = {
    errno.ENOSPC: "Free some space on that disk, then run the command again.",
    errno.EDQUOT: "Free some of your quota on that disk, then run the command again.",
    errno.EACCES: "Run as a user who may do this, or choose another place.",
    errno.EROFS: "Choose a place that can be written to.",
    errno.EADDRINUSE: "Another program listens there: stop it, or choose another port.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n), then run the command again.",
}


def run(args: Sequence[str], group: click.Group = shoal) -> int:
    """Run one command line (without the program's name) and return the exit code of the process.

    A command may return an exit code itself, or call `ctx.exit`; returning None means 0.
    """
    as_json = "--json" in args
    # click's own `main` is not used: it takes every EOFError for a cancelled prompt, and a peer that hangs up in the
    # middle of a frame is an EOFError too.
    try:
        with group.make_context("shoal", list(args)) as ctx:
            ended = group.invoke(ctx)
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except ShoalError as error:
        return _report(error, as_json)
    except ExceptionGroup as errors:
        # From a TaskGroup. When all are planned, the first is the cause and the others followed from it.
        planned, others = errors.split(ShoalError)
        if planned is None or others is not None:
            raise
        return _report(_first(planned), as_json)
    except OSError as error:
        if error.errno not in MACHINE_HINTS:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        output.error(_machine_message(error), code="machine", hint=MACHINE_HINTS[error.errno], as_json=as_json)
        return 5 if full else 1
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        output.error(error.format_message(), code="usage", hint=_usage_hint(error), as_json=as_json)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        output.note("")  # ends the line on which the terminal wrote ^C
        return 130
    return ended if isinstance(ended, int) else 0


def _report(error: ShoalError, as_json: bool) -> int:
    output.error(str(error), code=error.code, hint=error.hint, retry_after_s=error.retry_after_s, as_json=as_json)
    return error.exit_code


def _first(group: ExceptionGroup[ShoalError]) -> ShoalError:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, ExceptionGroup) else first


def _usage_hint(error: click.ClickException) -> str:
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    return f"`{ctx.command_path} --help` shows what can be asked for." if ctx else ""


def _machine_message(error: OSError) -> str:
    """The system's own words without Python's "[Errno 28]", and the file they are about."""
    words = error.strerror or str(error)
    return f"{words}: {error.filename}" if error.filename else f"{words}."
