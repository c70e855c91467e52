"""Turns documents, plays and chats into batches of token ids.

Letters in shapes: B rows of a batch, T tokens of a row.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from chats import Pair, pairs_of, pairs_of_plays, smalltalk, unique
from prose import Document, read_plays
from transformers import PreTrainedTokenizerFast
from vocabulary import ASSISTANT, BEGIN, END, SYSTEM, USER

IGNORED = -100  # a label that the loss skips
_SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are the demo model of shoal.",
    "You answer questions about Python, SQLite and PostgreSQL.",
    "Be friendly and concise.",
]


@dataclass(frozen=True)
class Mixture:
    """Shares of the rows of a batch, and of the chats in them; the rest is prose and pairs from the manuals."""

    chat_rows: float = 0.35
    play_rows: float = 0.06
    smalltalk_chats: float = 0.1
    play_chats: float = 0.08
    system_prompts: float = 0.12
    further_turns: float = 0.25


class Stream:
    """Running text as one array of ids, entered only where a paragraph starts."""

    def __init__(self, texts: list[list[str]], tokenizer: PreTrainedTokenizerFast) -> None:
        """`texts` holds one list of paragraphs per document."""
        self._begin, self._end = tokenizer.convert_tokens_to_ids([BEGIN, END])
        ids: list[int] = []
        starts: list[int] = []
        for paragraphs in texts:
            pieces = [*(paragraph + "\n\n" for paragraph in paragraphs[:-1]), paragraphs[-1]]
            ids.append(self._begin)
            for encoded in tokenizer(pieces, add_special_tokens=False)["input_ids"]:
                starts.append(len(ids))
                ids.extend(encoded)
            ids.append(self._end)
        self.ids = np.array(ids, dtype=np.int64)
        self._starts = np.array(starts)

    def row(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """A begin token and what follows a random paragraph start: ids [length]."""
        last = np.searchsorted(self._starts, len(self.ids) - length)
        start = self._starts[rng.integers(last)]
        return np.concatenate([[self._begin], self.ids[start : start + length - 1]])

    def windows(self, length: int) -> np.ndarray:
        """The whole stream cut into rows for validation: ids [B, length]."""
        rows = len(self.ids) // length
        return self.ids[: rows * length].reshape(rows, length)


class Chats:
    """Encoded question-answer pairs, put together to conversations in the form of the chat template."""

    def __init__(self, pairs: list[Pair], tokenizer: PreTrainedTokenizerFast) -> None:
        self._begin, self._end, self._system, self._user, self._assistant = tokenizer.convert_tokens_to_ids(
            [BEGIN, END, SYSTEM, USER, ASSISTANT]
        )
        questions = tokenizer([question for question, _ in pairs], add_special_tokens=False)["input_ids"]
        answers = tokenizer([answer for _, answer in pairs], add_special_tokens=False)["input_ids"]
        self._turns = list(zip(questions, answers, strict=True))
        self._prompts = tokenizer(_SYSTEM_PROMPTS, add_special_tokens=False)["input_ids"]

    def __len__(self) -> int:
        return len(self._turns)

    def conversation(self, rng: np.random.Generator, mixture: Mixture) -> tuple[list[int], list[int]]:
        """One conversation as (ids, labels); only what the assistant says, and its end token, is learnt."""
        ids = [self._begin]
        if rng.random() < mixture.system_prompts:
            ids += [self._system, *self._prompts[rng.integers(len(self._prompts))], self._end]
        labels = [IGNORED] * len(ids)
        while True:
            question, answer = self._turns[rng.integers(len(self._turns))]
            ids += [self._user, *question, self._end, self._assistant, *answer, self._end]
            labels += [IGNORED] * (len(question) + 3) + [*answer, self._end]
            if rng.random() >= mixture.further_turns:
                return ids, labels


class Corpus:
    """Everything the model learns from; the pages held out for validation are kept apart."""

    def __init__(self, documents: list[Document], corpus: Path, talk: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        learnt = [document for document in documents if not document.held_out]
        held_out = [document for document in documents if document.held_out]
        random.Random(0).shuffle(learnt)
        speeches = read_plays(corpus)
        self.prose = Stream([document.paragraphs for document in learnt], tokenizer)
        self.held_out_prose = Stream([document.paragraphs for document in held_out], tokenizer)
        self.plays = Stream([[f"{speaker}:\n{speech}" for speaker, speech in speeches]], tokenizer)
        self.manual_chats = Chats(unique(pair for document in learnt for pair in pairs_of(document)), tokenizer)
        self.play_chats = Chats(unique(pairs_of_plays(speeches, random.Random(0))), tokenizer)
        self.smalltalk = Chats(smalltalk(talk), tokenizer)

    def batch(
        self, rng: np.random.Generator, rows: int, length: int, mixture: Mixture
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels, both int64 [B, T]; a label stands one place to the left of its input, ready to compare."""
        made = [self._row(rng, length + 1, mixture) for _ in range(rows)]
        ids, labels = (np.array(part, dtype=np.int64) for part in zip(*made, strict=True))
        return ids[:, :-1], labels[:, 1:]

    def _row(self, rng: np.random.Generator, length: int, mixture: Mixture) -> tuple[list[int], list[int]]:
        kind = rng.random()
        if kind < mixture.chat_rows:
            return self._chat_row(rng, length, mixture)
        stream = self.plays if kind < mixture.chat_rows + mixture.play_rows else self.prose
        ids = stream.row(rng, length).tolist()
        return ids, ids

    def _chat_row(self, rng: np.random.Generator, length: int, mixture: Mixture) -> tuple[list[int], list[int]]:
        """Conversations one after another until the row is full; the last one may be cut."""
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < length:
            kind = rng.random()
            if kind < mixture.smalltalk_chats:
                chats = self.smalltalk
            elif kind < mixture.smalltalk_chats + mixture.play_chats:
                chats = self.play_chats
            else:
                chats = self.manual_chats
            more_ids, more_labels = chats.conversation(rng, mixture)
            ids += more_ids
            labels += more_labels
        return ids[:length], labels[:length]
