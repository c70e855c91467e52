"""From an answer's text, as it comes, to what the API shows of it: content, reasoning, calls of tools.

    opening tag? -> reasoning -> content -> marker -> name -> arguments -> (between -> name -> arguments)* -> closing

Everything is passed on as soon as it is certain what it is: a letter that may begin a tag, a marker or a stop string
waits for the next one.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shoal.gateway.calls import ID_CHARS, CallFormat, Tags
from shoal.gateway.text import StopFilter

_ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class CallPart:
    """A piece of one call: the first has id and name, the later ones only arguments."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Read:
    """What became certain. `settled` counts the characters of the raw text that do not wait any more."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallPart] = field(default_factory=list)
    settled: int = 0
    stopped: bool = False

    def __add__(self, later: Read) -> Read:
        return Read(
            self.content + later.content,
            self.reasoning + later.reasoning,
            self.calls + later.calls,
            later.settled,
            later.stopped,
        )


class AnswerReader:
    """Reads one answer. A stop string is looked for in content only: a call or a thought is not cut by it.

    `tags` None: the model's reasoning, if any, is content. `reasoning`: the prompt has opened it already.
    """

    def __init__(
        self,
        stops: Sequence[str] = (),
        *,
        calls: CallFormat | None = None,
        tags: Tags | None = None,
        reasoning: bool = False,
    ) -> None:
        self.called = False
        """The answer holds at least one whole call."""
        self._stop = StopFilter(stops)
        self._format = calls
        self._tags = tags
        self._text = ""
        self._consumed = 0
        self._content_held = 0  # characters in the stop filter
        self._count = 0
        self._json = _JsonEnd()
        self._read: Callable[[Read, bool], bool] = self._content
        if tags is not None:
            self._read = self._in_reasoning_start if reasoning else self._opening_tag

    def push(self, text: str) -> Read:
        """Take more of the answer."""
        self._text += text
        return self._go_on(last=False)

    def flush(self, *, cut: bool = False) -> Read:
        """The answer is over: nothing waits any more. With `cut` it could have gone on, so that what looks like the
        beginning of a call was one."""
        if cut and self._format is not None and (self._format.marker or self._format.opening).startswith(self._text):
            self._take(len(self._text))
        read = self._go_on(last=True)
        if not read.stopped:
            read.content += self._stop.flush()
            read.settled = self._consumed
        return read

    def _go_on(self, *, last: bool) -> Read:
        read = Read()
        while self._read(read, last) and not read.stopped:
            pass
        if not read.stopped:
            read.settled = self._consumed - self._content_held
        return read

    # --- each state takes what it can of the text; True: another state has the rest ---------------------------

    def _opening_tag(self, read: Read, last: bool) -> bool:
        assert self._tags is not None
        text = self._text.lstrip()
        if not last and self._tags.open.startswith(text):
            return False
        if text.startswith(self._tags.open):
            self._take(len(self._text) - len(text) + len(self._tags.open))
            self._read = self._in_reasoning_start
        else:
            self._read = self._content
        return True

    def _in_reasoning_start(self, read: Read, last: bool) -> bool:
        self._take(len(self._text) - len(self._text.lstrip()))
        if not self._text:
            return False
        self._read = self._in_reasoning
        return True

    def _in_reasoning(self, read: Read, last: bool) -> bool:
        assert self._tags is not None
        at = self._text.find(self._tags.close)
        if at >= 0:
            read.reasoning += self._take(at).rstrip()
            self._take(len(self._tags.close))
            self._read = self._after_reasoning
            return True
        safe = len(self._text) if last else _safe(self._text, self._tags.close)
        read.reasoning += self._take(safe)
        return False

    def _after_reasoning(self, read: Read, last: bool) -> bool:
        self._take(len(self._text) - len(self._text.lstrip()))
        if not self._text:
            return False
        self._read = self._content
        return True

    def _content(self, read: Read, last: bool) -> bool:
        if self._format is None:
            self._show(read, self._take(len(self._text)))
            return False
        marker = self._format.marker
        if marker is None:
            # A call is one from its first letter on, or it is none.
            if not last and self._format.opening.startswith(self._text):
                return False
            if self._text.startswith(self._format.opening):
                self._read = self._opening
            else:
                self._format = None
            return True
        at = self._text.find(marker)
        if at >= 0:
            self._show(read, self._take(len(self._text[:at].rstrip())))
            if not read.stopped:
                # White space before a call is not shown, but may be a stop string.
                shown = read.content
                self._show(read, self._take(self._text.find(marker)))
                read.content = shown
                self._read = self._opening
            return True
        safe = len(self._text) if last else _safe(self._text, marker)
        self._show(read, self._take(safe))
        return False

    def _opening(self, read: Read, last: bool) -> bool:
        assert self._format is not None
        opening = self._format.opening
        opening = opening[opening.find(self._format.marker or opening) :]
        if not last and len(self._text) < len(opening) and opening.startswith(self._text):
            return False
        if self._text.startswith(opening):
            self._take(len(opening))
            read.content += self._stop.flush()
            self._content_held = 0
            self._read = self._name
        elif last and opening.startswith(self._text):
            self._take(len(self._text))  # cut off before it named anything
            return False
        else:
            self._format = None
            self._read = self._content
        return True

    def _name(self, read: Read, last: bool) -> bool:
        assert self._format is not None
        at = self._text.find(self._format.middle)
        if at < 0:
            if last:
                self._take(len(self._text))
            return False
        name = self._take(at)
        self._take(len(self._format.middle))
        read.calls.append(CallPart(self._count, _new_id(), name))
        self._json = _JsonEnd()
        self._read = self._arguments
        return True

    def _arguments(self, read: Read, last: bool) -> bool:
        end = self._json.find(self._text)
        arguments = self._take(len(self._text) if end is None else end)
        if arguments:
            read.calls.append(CallPart(self._count, arguments=arguments))
        if end is None:
            return False
        self.called = True
        self._count += 1
        self._read = self._behind
        return True

    def _behind(self, read: Read, last: bool) -> bool:
        assert self._format is not None
        # The last literal before a next name: what stands before it may hold an id of the model's own.
        border = self._format.between[-1] if self._format.between else None
        at = -1 if border is None else self._text.find(border)
        if border is None or at < 0:
            if last:
                self._take(len(self._text))
            return False
        self._take(at + len(border))
        self._read = self._name
        return True

    # ----------------------------------------------------------------------------------------------------------

    def _take(self, count: int) -> str:
        taken, self._text = self._text[:count], self._text[count:]
        self._consumed += len(taken)
        return taken

    def _show(self, read: Read, text: str) -> None:
        began = self._consumed - len(text) - self._content_held
        shown, read.stopped = self._stop.push(text)
        read.content += shown
        if read.stopped:
            read.settled = began + len(shown)
        else:
            self._content_held += len(text) - len(shown)


class _JsonEnd:
    """Finds where a JSON object ends that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find(self, text: str) -> int | None:
        """The place behind the object's last brace, or None when it is not in `text`."""
        for place, letter in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = letter == "\\"
                self._in_string = letter != '"'
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
        return None


def _safe(text: str, mark: str) -> int:
    """How much of `text` can be passed on: not what may begin `mark`, nor white space that may stand before it."""
    end = len(text)
    for length in range(min(end, len(mark) - 1), 0, -1):
        if mark.startswith(text[-length:]):
            end -= length
            break
    return len(text[:end].rstrip())


def _new_id() -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(ID_CHARS))
