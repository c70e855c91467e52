"""Answers in OpenAI's two dialects: the chat format and the older text-completion format, whole or in chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from shoal.gateway.choices import Piece, TokenReport
from shoal.gateway.reading import CallPart
from shoal.gateway.text import Vocabulary

# OpenAI's own stand-in for log(0), which JSON cannot write.
_LOWEST_LOGPROB = -9999.0


class Dialect(Protocol):
    """How one endpoint words its answers."""

    def envelope(self, *, stream: bool) -> dict[str, Any]:
        """The fields around `choices`; the same in every chunk of a stream."""
        ...

    def opening(self, choice: int) -> dict[str, Any] | None:
        """What a streamed choice says before its first token, if anything."""
        ...

    def delta(self, piece: Piece) -> dict[str, Any]:
        """One piece as an entry of a chunk's `choices`."""
        ...

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """All pieces of one choice as an entry of `choices`."""
        ...


class ChatDialect:
    """/v1/chat/completions. `plain`: every token is content; else some are reasoning, calls or marks between."""

    def __init__(
        self, model: str, request_id: str, vocabulary: Vocabulary, *, logprobs: bool, plain: bool = True
    ) -> None:
        self._common = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": model}
        self._vocabulary = vocabulary
        self._logprobs = logprobs
        self._plain = plain

    def envelope(self, *, stream: bool) -> dict[str, Any]:
        return {**self._common, "object": "chat.completion.chunk" if stream else "chat.completion"}

    def opening(self, choice: int) -> dict[str, Any] | None:
        # Where there may be no content at all, "" would be one.
        delta = {"role": "assistant", "content": "" if self._plain else None, "refusal": None}
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.choice,
            "delta": self._delta(piece),
            "logprobs": self._reports(piece.reports) if piece.reports else None,
            "finish_reason": piece.finish,
        }

    def _delta(self, piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if piece.text or (self._plain and not piece.finish):
            delta["content"] = piece.text
        if piece.reasoning:
            delta["reasoning_content"] = piece.reasoning
        if piece.calls:
            delta["tool_calls"] = [_call_delta(part) for part in piece.calls]
        return delta

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        calls = _whole_calls([part for piece in pieces for part in piece.calls])
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if not self._plain:
            message["content"] = text if text or not calls else None
            reasoning = "".join(piece.reasoning for piece in pieces)
            message |= {"reasoning_content": reasoning} if reasoning else {}
            message |= {"tool_calls": calls} if calls else {}
        return {
            "index": pieces[-1].choice,
            "message": message,
            "logprobs": self._reports([report for piece in pieces for report in piece.reports]),
            "finish_reason": pieces[-1].finish,
        }

    def _reports(self, reports: Sequence[TokenReport]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        entries = []
        for report in reports:
            top = [self._entry(token, logprob) for token, logprob in report.sampled.top]
            entries.append({**self._entry(report.sampled.token, report.sampled.logprob), "top_logprobs": top})
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = self._vocabulary.token_bytes(token)
        return {"token": _token_name(data), "logprob": _finite(logprob), "bytes": list(data)}


class CompletionDialect:
    """/v1/completions."""

    def __init__(self, model: str, request_id: str, vocabulary: Vocabulary, *, alternatives: int | None) -> None:
        self._common = {"id": f"cmpl-{request_id}", "object": "text_completion", "created": int(time.time())}
        self._common["model"] = model
        self._vocabulary = vocabulary
        self._alternatives = alternatives

    def envelope(self, *, stream: bool) -> dict[str, Any]:
        return self._common

    def opening(self, choice: int) -> dict[str, Any] | None:
        return None

    def delta(self, piece: Piece) -> dict[str, Any]:
        return self._choice(piece, piece.text, piece.reports)

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        return self._choice(pieces[-1], text, [report for piece in pieces for report in piece.reports])

    def _choice(self, last: Piece, text: str, reports: Sequence[TokenReport]) -> dict[str, Any]:
        logprobs = None if self._alternatives is None else self._reports(reports)
        return {"index": last.choice, "text": text, "logprobs": logprobs, "finish_reason": last.finish}

    def _reports(self, reports: Sequence[TokenReport]) -> dict[str, Any]:
        tops = []
        for report in reports:
            # The chosen token is always listed, as OpenAI does it, so there may be one more than was asked for.
            pairs = [*report.sampled.top, (report.sampled.token, report.sampled.logprob)]
            tops.append({self._name(token): _finite(logprob) for token, logprob in pairs})
        return {
            "tokens": [self._name(report.sampled.token) for report in reports],
            "token_logprobs": [_finite(report.sampled.logprob) for report in reports],
            "top_logprobs": tops if self._alternatives else None,
            "text_offset": [report.offset for report in reports],
        }

    def _name(self, token: int) -> str:
        return _token_name(self._vocabulary.token_bytes(token))


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """What the answer cost, in tokens; an end token counts, since it was generated."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def _call_delta(part: CallPart) -> dict[str, Any]:
    """A part of a call as it is streamed: id, type and name once, then only arguments."""
    if part.id is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    function = {"name": part.name, "arguments": part.arguments}
    return {"index": part.index, "id": part.id, "type": "function", "function": function}


def _whole_calls(parts: Sequence[CallPart]) -> list[dict[str, Any]]:
    calls: dict[int, dict[str, Any]] = {}
    for part in parts:
        if part.id is not None:
            function = {"name": part.name, "arguments": ""}
            calls[part.index] = {"id": part.id, "type": "function", "function": function}
        calls[part.index]["function"]["arguments"] += part.arguments
    return list(calls.values())


def _token_name(data: bytes) -> str:
    """A token's text; bytes that are no whole characters are written out as OpenAI does it."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float | None) -> float:
    # `not >=` also catches NaN.
    return logprob if logprob is not None and logprob >= _LOWEST_LOGPROB else _LOWEST_LOGPROB
