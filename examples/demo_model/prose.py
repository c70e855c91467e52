"""Turns the raw documentation into paragraphs of plain English prose.

The corpus (`plain_text/docs.jsonl.gz`) holds whole manual pages: reStructuredText for Python, HTML reduced to text for
SQLite and PostgreSQL. So small a model learns words and sentences from them, but code, tables and
menus only make it stutter, so they go. Every dropped paragraph is counted under the reason for which it was dropped.
"""

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Pages that are lists rather than prose, or that repeat other pages word for word.
_SKIPPED_PAGES = re.compile(
    r"requirements\.html|capi3ref\.html|crossref\.html|changes\.html|releaselog/|syntaxdiagrams|/syntax/|fileformat\.html"
    r"|sqlanalyze|c_interface\.html|oldnews|vdbe\.html|bookindex|keywords-appendix|release-15|errcodes-appendix"
    r"|biblio|/contents\.rst|features-sql-standard|unsupported-features|changelog"
)
_HELD_OUT_SHARE = 0.02
_PLAIN_PUNCTUATION = str.maketrans({"“": '"', "”": '"', "’": "'", "—": "-", "–": "-", "…": "..."})


@dataclass(frozen=True)
class Document:
    """One manual page: `raw` is the text as it came, `paragraphs` is the prose found in it."""

    id: str
    source: str
    licence: str
    raw: str
    paragraphs: list[str]

    @property
    def held_out(self) -> bool:
        """Whether the page is kept for validation; decided by a hash of its name, so it never changes."""
        return int(hashlib.sha256(self.id.encode()).hexdigest()[:8], 16) < _HELD_OUT_SHARE * 2**32


@dataclass
class Dropped:
    """How much was left out, by reason."""

    pages: int = 0
    paragraphs: Counter[str] = field(default_factory=Counter)


def read_documents(corpus: Path, dropped: Dropped) -> Iterator[Document]:
    """Yields every page with at least one paragraph of prose. A paragraph seen before is not repeated."""
    seen: set[str] = set()
    with gzip.open(corpus / "plain_text" / "docs.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if _SKIPPED_PAGES.search(row["id"]):
                dropped.pages += 1
                continue
            paragraphs = []
            for block in split_blocks(row["text"]):
                text = clean(block, rst=row["source"] == "python-docs")
                reason = why_not_prose(text) or ("repeated" if text in seen else None)
                if reason:
                    dropped.paragraphs[reason] += 1
                else:
                    seen.add(text)
                    paragraphs.append(text)
            if paragraphs:
                yield Document(row["id"], row["source"], row["licence"], row["text"], paragraphs)


def read_plays(corpus: Path) -> list[tuple[str, str]]:
    """Tiny Shakespeare as (speaker, speech) pairs; the line breaks of the verse stay."""
    text = (corpus / "plain_text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    speeches = []
    for block in text.split("\n\n"):
        speaker, colon, speech = block.strip().partition(":\n")
        if colon and speech:
            speeches.append((speaker, speech.strip()))
    return speeches


def split_blocks(text: str) -> list[str]:
    """Cuts a page at its empty lines."""
    return [block for block in re.split(r"\n[ \t]*\n", text) if block.strip()]


def clean(block: str, *, rst: bool) -> str:
    """Joins the lines of a block and removes markup. An empty string means that nothing readable was left."""
    if rst:
        block = _strip_rst(block)
    lines = [line.strip() for line in block.replace("\xa0", " ").split("\n")]
    lines = [line for line in lines if line]
    # HTML reduced to text glues a heading to the paragraph below it.
    if len(lines) > 1 and _is_heading(lines[0]) and lines[1][:1].isupper():
        lines = lines[1:]
    text = re.sub(r"\s+", " ", " ".join(lines)).strip()
    text = re.sub(r" ([,.;:?!)\]”])", r"\1", text)  # inline tags left a space behind
    text = re.sub(r"([(\[“]) ", r"\1", text)
    return text.translate(_PLAIN_PUNCTUATION)


def why_not_prose(text: str) -> str | None:
    """None for a paragraph of prose, else the reason for leaving it out."""
    if len(text) < 50:
        return "short"
    if len(text) > 3000:
        return "long"
    if not re.match(r"[A-Z\"'(]|[a-z_]+\w*\(?", text) or text[-1] not in '.!?:")':
        return "not a sentence"
    if re.search(r"[{}\\|]|>>>|==|--\w|::|;\s*$|\[ |Prev |https?:|``|:\w+:`|\(Contributed by", text):
        return "code or markup"
    words = text.split()
    plain = sum(1 for word in words if re.fullmatch(r"[\"'(]*[A-Za-z][a-z'-]*[\"').,;:?!]*", word))
    if plain < 0.75 * len(words):
        return "few plain words"
    if sum(1 for word in words if word[:1].islower()) < 0.55 * len(words):
        return "mostly names"
    return None


def _is_heading(line: str) -> bool:
    return len(line) < 60 and line[-1:] not in ".,;:" and len(line.split()) <= 6


def _strip_rst(block: str) -> str:
    """reStructuredText to plain text: roles, links, emphasis; a note keeps its body, other directives go."""
    lines = block.strip().split("\n")
    if lines[0].lstrip().startswith(".. "):
        if not re.match(r"\s*\.\. (note|warning|seealso|tip|important)::", lines[0]):
            return ""
        lines[0] = lines[0].split("::", 1)[1]
    lines = [re.sub(r"^\s*([*\-#]|\d+\.) ", "", line) for line in lines if not re.match(r"\s*:\w[\w ]*:(\s|$)", line)]
    text = "\n".join(lines)
    text = re.sub(r":[\w:+-]+:`[^`<]*?([^`<]+?)\s*<[^`>]*>`", r"\1", text)
    text = re.sub(r":[\w:+-]+:`~[\w.]*?(\w+(?:\(\))?)`", r"\1", text)
    text = re.sub(r":pep:`(\d+)`", r"PEP \1", text)
    text = re.sub(r":rfc:`(\d+)`", r"RFC \1", text)
    text = re.sub(r":[\w:+-]+:`[!~]?([^`]*)`", r"\1", text)
    text = re.sub(r"``([^`]*)``", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`_+", r"\1", text)
    text = re.sub(r"`([^`]+)`_*", r"\1", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"\1", text)
    text = re.sub(r"\*([^*\s][^*]*)\*", r"\1", text)
    text = re.sub(r"\s?\[#?\w*\]_", "", text)
    return re.sub(r"::\s*$", ":", text)
