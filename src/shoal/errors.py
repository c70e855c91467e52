"""Every error shoal raises on purpose, on one screen.

A message says what happened, whose doing it was and what to do next. The command line prints `str(error)` and, when
there is one, `hint` on a line of its own, then exits with `exit_code`; the gateway turns `code` and `http_status`
into an OpenAI-shaped error body. Exit codes: 1 failure, 2 usage, 3 the answer is no, 4 refused, 5 full.
"""

from __future__ import annotations


class ShoalError(Exception):
    """Base of all errors shoal raises on purpose."""

    code = "failure"
    exit_code = 1
    http_status = 500

    def __init__(self, message: str, *, hint: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.retry_after_s = retry_after_s


class UsageError(ShoalError):
    """The caller asked for something that cannot be asked for (a flag, a block range, a request field)."""

    code = "invalid_request"
    exit_code = 2
    http_status = 400


class ModelError(UsageError):
    """A model directory cannot be used: missing files, pickle weights, unknown family."""

    code = "model_error"


class CannotSplit(ModelError):
    """This decoder family (or this cut) cannot be split at the asked layer border; the message says why."""

    code = "cannot_split"
    exit_code = 3


class ContextTooLong(UsageError):
    """Prompt plus requested tokens exceed the model's context length."""

    code = "context_length_exceeded"


class Refused(ShoalError):
    """The other side does not let us in: certificate, role, swarm or protocol version."""

    code = "refused"
    exit_code = 4
    http_status = 403


class ProtocolError(ShoalError):
    """The peer sent bytes that break docs/protocol.md. Always the sender's doing; the connection is closed."""

    code = "protocol_error"


class NotFinite(ShoalError):
    """Activations hold NaN, infinite or absurdly large values. The step is lost, the connection is fine."""

    code = "not_finite"


class PeerLost(ShoalError):
    """A connection to a peer ended. `cause` is one word: closed, reset, silent (longer than the heartbeat allows), or
    unreachable (it never stood)."""

    code = "peer_lost"

    def __init__(
        self, message: str, *, hint: str = "", retry_after_s: float | None = None, cause: str = "closed"
    ) -> None:
        super().__init__(message, hint=hint, retry_after_s=retry_after_s)
        self.cause = cause


class Full(ShoalError):
    """A server has no room for another session now. Nothing is broken: try again after `retry_after_s`."""

    code = "full"
    exit_code = 5
    http_status = 429


class DiskFull(ShoalError):
    """A disk of this machine, or the user's share of it, has no room for a file that is needed."""

    code = "disk_full"
    exit_code = 5


class SwarmIncomplete(ShoalError):
    """Some blocks of the model are hosted by no live server, so no chain can be built."""

    code = "swarm_incomplete"
    exit_code = 3
    http_status = 503


class PolicyUnmet(ShoalError):
    """A trust zone demands labels that no suitable live node carries. Nothing was sent to any other."""

    code = "policy_unmet"
    exit_code = 3
    http_status = 503


class NoSuchNode(ShoalError):
    """No live node of the swarm goes by that id."""

    code = "no_such_node"
    exit_code = 3
    http_status = 404


class NotEnoughRoom(ShoalError):
    """The machines are too few or too small for the model; the message says by how much."""

    code = "not_enough_room"
    exit_code = 3
    http_status = 503
