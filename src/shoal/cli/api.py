"""Talks to a gateway's HTTP API for the commands, and turns its errors into ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from shoal.cli import output
from shoal.errors import Full, PolicyUnmet, Refused, ShoalError, SwarmIncomplete, UsageError

if TYPE_CHECKING:
    import httpx

_ERRORS: dict[int, type[ShoalError]] = {400: UsageError, 401: Refused, 403: Refused, 404: UsageError, 429: Full}


class Api:
    """One connection to an API base URL such as http://127.0.0.1:8080/v1."""

    def __init__(self, api: str, key: str) -> None:
        import httpx

        self.base = api.rstrip("/")
        # No read timeout: a long prompt takes its time, and the gateway sends keep-alives and errors itself.
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"}, timeout=httpx.Timeout(10.0, read=None), trust_env=False
        )

    @classmethod
    def of_running_swarm(cls, api: str | None = None, key: str | None = None) -> Api:
        """The API that was named, or the one of the running `shoal up`. Raises UsageError when there is none."""
        from shoal.launch import state

        return cls(*state.find(api, key, on_several=output.note))

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def get(self, path: str, query: dict[str, str] | None = None) -> Any:
        """The JSON answer of a GET. Raises ShoalError."""
        import httpx

        try:
            response = self._client.get(self.base + path, params=query or None)
        except httpx.TransportError as error:
            raise self._unreachable() from error
        self._check(response)
        return response.json()

    def only_model(self) -> str:
        """The served model's name. Raises UsageError when there are several, so that none is taken by chance."""
        names = [entry["id"] for entry in self.get("/models")["data"]]
        if len(names) != 1:
            raise UsageError(f"{len(names)} models are served: {', '.join(names)}.", hint="Choose one with --model.")
        return str(names[0])

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Any]:
        """The events of a streaming POST. Raises ShoalError also for an error inside the stream, and for a stream
        that just ends."""
        import httpx

        try:
            with self._client.stream("POST", self.base + path, json=body) as response:
                if response.status_code != 200:
                    response.read()
                self._check(response)
                for line in response.iter_lines():
                    if not line.startswith("data: "):
                        continue
                    if line == "data: [DONE]":
                        return
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise _error_of(event["error"], 500, None)
                    yield event
        except httpx.TransportError as error:
            raise self._unreachable() from error
        raise ShoalError("The gateway's answer ended in the middle.", hint="Look into the gateway's log.")

    def _check(self, response: httpx.Response) -> None:
        if response.is_success:
            return
        retry = response.headers.get("retry-after")
        try:
            error = response.json()["error"]
        except (ValueError, KeyError):
            raise ShoalError(f"The gateway answered with HTTP status {response.status_code}.") from None
        raise _error_of(error, response.status_code, float(retry) if retry else None)

    def _unreachable(self) -> ShoalError:
        return ShoalError(f"No gateway answers at {self.base}.", hint="Start a swarm with `shoal up`.")


def _error_of(error: dict[str, Any], status: int, retry_after_s: float | None) -> ShoalError:
    by_code = {kind.code: kind for kind in (SwarmIncomplete, PolicyUnmet)}
    kind = by_code.get(str(error.get("code"))) or _ERRORS.get(status, ShoalError)
    return kind(str(error.get("message")), retry_after_s=retry_after_s)
