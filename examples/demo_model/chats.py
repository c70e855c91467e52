"""Derives question-and-answer pairs from the documentation, by rule and without any other model.

The documentation names a thing and then says what it does: a heading and its first paragraph, a function and its
description, a glossary entry. Each such pair becomes a question, worded in one of several ways, with the text of the
manual as the answer. Scenes of Shakespeare and the hand-written lines of `smalltalk.toml` complete the set.
"""

import itertools
import random
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

from prose import Document, clean, split_blocks, why_not_prose

Pair = tuple[str, str]

_WHAT = ["What is {}?", "what is {}", "Explain {}.", "Tell me about {}.", "Can you explain {}?", "Define {}."]
_DOES = ["What does {} do?", "What is {} for?", "What is {}?", "How does {} work?", "Explain {}.", "Tell me about {}."]
_ABOUT = ["Tell me about {}.", "Explain {}.", "What is {}?", "What should I know about {}?", "Write about {}."]
_STANDS = ["What does {} stand for?", "What does {} mean?", "What is {}?"]
_LINES = ["Speak like {}.", "Say something as {}.", "What does {} say?", "Write a line for {}."]
_CONTINUE = ["Continue: {}", "Continue this text: {}", "Complete the sentence: {}", "Finish this: {}"]

_ANSWER_CHARS = 420
_CONTINUED_SHARE = 0.04  # of the paragraphs also serve as "Continue: ..."
_PRODUCTS = {"python-docs": "Python", "sqlite-docs": "SQLite", "postgresql-docs": "PostgreSQL"}
_MEMBER = re.compile(
    r"^\.\. (?:c:)?(function|method|class|exception|attribute|data|staticmethod|classmethod):: "
    r"(?:[\w *]+[ *])?([\w.]+)(?:\(|\s*$)",
    re.M,
)
_SETTING = re.compile(
    r"(?:^|\s)([a-z]+(?:_[a-z]+)+) \( ?(?:integer|boolean|string|enum|floating point) ?\)\s*\n\s*\n(.+?)\n[ \t]*\n",
    re.S,
)
_DEFINES = re.compile(r"(?:An?|The) ((?:[\w-]+ ){0,3}[\w-]+) (?:is|are) (?:an?|the|one) ")


def pairs_of(document: Document) -> Iterator[Pair]:
    """All pairs that one page yields; what is asked about a topic is worded in two ways."""
    rng = random.Random(document.id)
    find = {"python-docs": _python_topics, "sqlite-docs": _sqlite_topics, "postgresql-docs": _postgresql_topics}
    for wordings, topic, answer in find[document.source](document):
        for wording in rng.sample(wordings, 2):
            yield wording.format(topic), answer
    for paragraph in document.paragraphs:
        defined = _DEFINES.match(paragraph)
        if defined and not re.search(r"\b(which|that|in|this)\b", defined[1]):
            article = "an" if paragraph.startswith("An ") else "a"
            yield rng.choice(_WHAT).format(f"{article} {defined[1]}"), _shorten(paragraph)
        if len(paragraph) > 120 and rng.random() < _CONTINUED_SHARE:
            words = paragraph.split()
            cut = rng.randint(5, 12)
            yield rng.choice(_CONTINUE).format(" ".join(words[:cut])), _shorten(" ".join(words[cut:]))


def pairs_of_plays(speeches: list[tuple[str, str]], rng: random.Random) -> Iterator[Pair]:
    """A question about a speaker and one of the speeches as its answer."""
    for speaker, speech in speeches:
        if 40 < len(speech) < 320 and rng.random() < 0.35:
            name = speaker.title() if rng.random() < 0.5 else speaker
            yield rng.choice(_LINES).format(name), speech


def smalltalk(path: Path) -> list[Pair]:
    """The hand-written pairs: every wording of a question with every wording of its answer."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["talk"]
    return [(question, answer) for entry in entries for question in entry["questions"] for answer in entry["answers"]]


def _python_topics(document: Document) -> Iterator[tuple[list[str], str, str]]:
    text = document.raw
    module = re.search(r"^\.\. module:: ([\w.]+)\s*\n(?:.*\n)*? ?:synopsis: (.+)", text, re.M)
    if module and document.paragraphs:
        name, synopsis = module[1], clean(module[2], rst=True).rstrip(".")
        yield _WHAT, f"the {name} module", f"The {name} module: {synopsis}. {_shorten(document.paragraphs[0])}"
    title = re.search(r"^[=*#]*\n?(.+)\n[=*]{4,}", text, re.M)
    if title and not module and document.paragraphs:
        yield _ABOUT, _lower_title(clean(title[1], rst=True)), _shorten(document.paragraphs[0])
    blocks = split_blocks(text)
    for block, following in itertools.pairwise(blocks):
        member = _MEMBER.search(block)
        if member:
            answer = clean(following, rst=True)
            if not why_not_prose(answer):
                prefix = "" if "." in member[2] or not module or member[1] == "method" else f"{module[1]}."
                name = prefix + member[2]
                yield _DOES, name, f"{name}: {_shorten(answer)}"
    if document.id.endswith("/glossary.rst.txt"):
        for block in blocks:
            term, _, meaning = block.strip().partition("\n")
            answer = clean(meaning, rst=True)
            if len(term) < 40 and not why_not_prose(answer):
                yield _WHAT, term.strip(), f"{term.strip().capitalize()}: {_shorten(answer)}"


def _sqlite_topics(document: Document) -> Iterator[tuple[list[str], str, str]]:
    title = _lower_title(clean(document.raw.split("\n", 1)[0], rst=False))
    if 3 < len(title) < 60 and document.paragraphs:
        yield _ABOUT, _in_product(title, document), _shorten(document.paragraphs[0])
    for paragraph in document.paragraphs:
        named = re.match(
            r"The ((?:PRAGMA )?[\w.]+(?:\([^)]*\))?) "
            r"(function|statement|pragma|command|interface|opcode|option|routine|operator|method|clause)\b",
            paragraph,
        )
        if named:
            yield _DOES, f"the {named[1]} {named[2]}", _shorten(paragraph)


def _postgresql_topics(document: Document) -> Iterator[tuple[list[str], str, str]]:
    text = document.raw.replace("\xa0", " ")
    title = re.match(r"(?:(?:Chapter )?[\dA-Z.]+\. )?(.+?) (?=(?:(?:Chapter )?[\dA-Z.]+\. )?\1 Prev)", text)
    if title and document.paragraphs and len(title[1]) < 60:
        purpose = re.search(re.escape(title[1]) + r" — ([^\n]*(?:\n[^\n]+)?) Synopsis", text)
        if purpose:
            name = title[1]
            yield _DOES, name, f"{name}: {' '.join(purpose[1].split())}. {_shorten(document.paragraphs[0])}"
        else:
            yield _ABOUT, _in_product(_lower_title(title[1]), document), _shorten(document.paragraphs[0])
    for setting in _SETTING.finditer(text):
        answer = clean(setting[2], rst=False)
        if not why_not_prose(answer):
            yield _DOES, setting[1], f"{setting[1]}: {_shorten(answer)}"
    if document.id.endswith("/acronyms.html"):
        for short, long in re.findall(r"\n ([A-Z]{2,6}) \n \n ([A-Z][\w\s-]+?) (?=\n [A-Z]{2,6} \n)", text):
            yield _STANDS, short, f"{short} stands for {' '.join(long.split())}."
    if document.id.endswith("/glossary.html"):
        entry = re.compile(r"\. ([A-Z][\w -]{2,30}?)(?: \([a-z]+\))? \n ((?:An?|The|In|To) .+?\.)\n", re.S)
        for term, meaning in entry.findall(text):
            yield _WHAT, _lower_title(term), f"{term}: {_shorten(clean(meaning, rst=False))}"


def _in_product(topic: str, document: Document) -> str:
    product = _PRODUCTS[document.source]
    return topic if product in topic else f"{topic} in {product}"


def _lower_title(title: str) -> str:
    """Title Case to running text; names and abbreviations keep their capitals."""
    words = [word.lower() if re.fullmatch(r"[A-Z][a-z-]+", word) else word for word in title.split()]
    return " ".join("Python" if word == "python" else word for word in words)


def _shorten(text: str) -> str:
    """The first sentences of a paragraph, whole ones, up to about 420 characters; none that only announces a list."""
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z\"(])", text)
    if len(sentences) > 1 and sentences[-1].endswith(":"):
        sentences.pop()
    kept = ""
    for sentence in sentences:
        if kept and len(kept) + len(sentence) > _ANSWER_CHARS:
            break
        kept = f"{kept} {sentence}".strip()
    return kept


def unique(pairs: Iterable[Pair]) -> list[Pair]:
    """Drops repeated pairs and answers too long or too short to learn from; keeps the order."""
    return [pair for pair in dict.fromkeys(pairs) if 15 < len(pair[1]) < 900]
