"""From tokens to text, one token at a time: no half characters, no stop strings."""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Sequence
from typing import Any, Protocol

from shoal.gateway.served import Tokenizer

# Tokens of the prompt that a windowed stream decodes before the first new one, so that the tokenizer knows whether a
# leading space belongs to it. Same figure as vLLM's.
_CONTEXT_TOKENS = 5

# A character has at most four UTF-8 bytes, so at most three tokens can wait for its last one. More than that are
# bytes which are no text at all; they are shown as the tokenizer shows them.
_MAX_HELD_TOKENS = 4


class TextStream(Protocol):
    """Turns tokens into text as they come."""

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character waits for its last byte."""
        ...

    def flush(self) -> str:
        """What is still held and is text; a character that never got its last byte is dropped."""
        ...


class Vocabulary:
    """A tokenizer as the gateway uses it: text to tokens, tokens to text, the bytes behind one token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # all_special_ids has only those with a name of their own (bos_token ...), not for example [TOOL_CALLS].
        added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = frozenset(tokenizer.all_special_ids) | {id for id, token in added.items() if token.special}
        self._byte_level = _decoder_type(tokenizer) == "ByteLevel"
        self._token_bytes: dict[int, bytes] = {}
        self.size = len(tokenizer)
        # The first call settles truncation and padding inside the tokenizer; later calls only read it, so that
        # `encode` may run in a worker thread while the event loop decodes.
        tokenizer.encode("", add_special_tokens=False)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def stream(self, prompt: Sequence[int]) -> TextStream:
        """A fresh stream for the answer to `prompt`."""
        if self._byte_level:
            return _ByteStream(self)
        context = [token for token in prompt[-_CONTEXT_TOKENS:] if token not in self._special]
        return _WindowStream(self, context)

    def byte_stream(self, shown: Collection[int] = ()) -> TextStream:
        """A fresh stream whose text is `token_bytes` and nothing else, as a grammar sees it; special tokens in `shown`
        are text too. Only a first space is dropped where the tokenizer puts one before every word."""
        return _ByteStream(self, frozenset(shown), drops_space=not self._byte_level)

    @property
    def starts_with_space(self) -> bool:
        """Whether a first word usually has a space before it that is no part of the text (SentencePiece)."""
        return not self._byte_level

    @property
    def special(self) -> frozenset[int]:
        """The tokens that are never text, such as the end of an answer."""
        return self._special

    def is_special(self, token: int) -> bool:
        """True for tokens that are never text, such as the end of an answer."""
        return token in self._special

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for; empty for an id that the tokenizer does not know."""
        known = self._token_bytes.get(token)
        if known is None:
            piece = self._tokenizer.convert_ids_to_tokens(token) if 0 <= token < self.size else None
            known = self._token_bytes[token] = self._piece_bytes(piece or "")
        return known

    def _piece_bytes(self, piece: str) -> bytes:
        if self._byte_level:
            # As tokenizers does it: a piece with any character outside the table (an added token) is plain text.
            try:
                return bytes(_BYTE_OF_CHAR[char] for char in piece)
            except KeyError:
                return piece.encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return piece.replace("▁", " ").encode()


class _ByteStream:
    """For byte-level tokenizers (GPT-2, Llama 3, Qwen and most others): exact, constant time per token."""

    def __init__(
        self, vocabulary: Vocabulary, shown: frozenset[int] = frozenset(), *, drops_space: bool = False
    ) -> None:
        self._vocabulary = vocabulary
        self._shown = shown
        self._drops_space = drops_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        if self._vocabulary.is_special(token) and token not in self._shown:
            return ""
        text = self._utf8.decode(self._vocabulary.token_bytes(token))
        if text and self._drops_space:
            self._drops_space = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        return ""


class _WindowStream:
    """For all other tokenizers: decodes the last few tokens with and without the new one and emits the difference."""

    def __init__(self, vocabulary: Vocabulary, context: list[int]) -> None:
        self._vocabulary = vocabulary
        self._tokens = context
        self._shown = len(context)  # tokens whose text is out; the window keeps them as left context
        self._shown_text = vocabulary.decode(context)

    def push(self, token: int) -> str:
        if self._vocabulary.is_special(token):
            return ""
        self._tokens.append(token)
        text = self._vocabulary.decode(self._tokens)
        held = len(self._tokens) - self._shown
        if held < _MAX_HELD_TOKENS and (text.endswith("�") or len(text) <= len(self._shown_text)):
            return ""
        new = text[len(self._shown_text) :]
        # What was just shown begins at a character's first byte, so it is a safe left end for the window.
        self._tokens = self._tokens[self._shown :]
        self._shown = held
        self._shown_text = self._vocabulary.decode(self._tokens)
        return new

    def flush(self) -> str:
        return self._vocabulary.decode(self._tokens)[len(self._shown_text) :].rstrip("�")


class StopFilter:
    """Lets text through up to the first stop string, which is never let through, not even its first letters."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop string was reached (then there is no more to come)."""
        if not self._stops:
            return text, False
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            return self._held[: min(found)], True
        return self._take(len(self._held) - self._beginnings()), False

    def flush(self) -> str:
        """What was held back as the possible beginning of a stop string that did not come."""
        return self._take(len(self._held))

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _beginnings(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        for length in range(min(len(self._held), max(map(len, self._stops)) - 1), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


def _decoder_type(tokenizer: Tokenizer) -> str | None:
    """The decoder that a `tokenizers` tokenizer names in its file, or None for any other kind of tokenizer."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    return None if decoder is None else json.loads(decoder.__getstate__()).get("type")


def _byte_of_char() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes for characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
