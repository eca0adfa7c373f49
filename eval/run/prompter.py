"""Prompts of a tokenizer: drafts become tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain, repeat

from hfsparse.errors import UsageError
from hfsparse.models.chat import frames
from hfsparse_eval.tasks.draft import Ask, Draft


@dataclass(frozen=True)
class Turn:
    """One question of a conversation, asked when the text and the turns before were read."""

    ids: tuple[int, ...]  # from the end of the text, or of the answer before, up to the answer
    answers: tuple[str, ...]
    given: tuple[int, ...] = ()  # the right answer, where it goes on in place of the model's own


@dataclass(frozen=True)
class Sample:
    id: str
    task: str
    seed: int
    length: int  # tokens asked for
    real: int  # tokens of the prompt and the room for the answer
    ids: tuple[int, ...]
    answers: tuple[str, ...]
    gold: tuple[tuple[int, int], ...]  # of `ids`: what holds the answers, if any place does
    depth: float | None
    metric: str
    new_tokens: int  # of each answer
    question: int = 0  # of `ids`: where the question starts, after the whole text
    turns: tuple[Turn, ...] = ()  # `ids` are the text that these ask about


class Prompter:
    """Turns drafts into token ids, with the tokenizer's chat template if it has one.

    In conversations, right answers go on in place of the model's own if `gold`, and the first
    question is read together with the text if `known`.
    """

    def __init__(self, tokenizer, chat: str = "auto", gold: bool = False, known: bool = False):
        if not tokenizer.is_fast:
            raise UsageError("this model's tokenizer gives no offsets: a fast tokenizer is needed")
        self.tokenizer = tokenizer
        self.chat = chat == "auto" and bool(tokenizer.chat_template)
        self.frames = frames(tokenizer) if self.chat else None
        self.gold = gold
        self.known = known
        first = tokenizer("").input_ids[:1]
        self.bos = first if first == [tokenizer.bos_token_id] else []

    def text(self, draft: Draft) -> str:
        """The whole prompt but for a BOS token that the tokenizer would put first itself."""
        if not self.chat:
            return draft.message + draft.prefix
        head, tail = self.frames
        head = head.removeprefix(self.tokenizer.bos_token if self.bos else "")
        return head + draft.message + ("" if draft.asks else tail + draft.prefix)

    def between(self, draft: Draft) -> list[str]:
        """What stands between the text, or the answer before, and the answer to each question."""
        first = later = "\n\n", ""  # before and after a question
        if self.chat:
            first = "\n\n", self.frames[1]
        if self.chat and len(draft.asks) > 1:
            later = tuple(frames(self.tokenizer, turns=3)[2:])
        if draft.asks and not draft.asks[0].question:  # the text ends with the first question
            first = "", first[1]
        return [
            before + ask.question + after + ask.prefix
            for (before, after), ask in zip(chain([first], repeat(later)), draft.asks, strict=False)
        ]

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def tokens(self, text: str) -> int:
        return len(self.ids(text))

    def real(self, draft: Draft, new_tokens: int) -> int:
        """Tokens of the prompt and the room for the answer, or of all turns."""
        given = [self.text(draft), *self.between(draft)]
        return sum(map(self.tokens, given)) + max(len(draft.asks), 1) * new_tokens

    def sample(self, draft: Draft, new_tokens: int, **named) -> Sample:
        ids, gold, question = self.encode(draft)
        turns = tuple(
            Turn(self.ids(text), ask.answers, self._given(ask))
            for text, ask in zip(self.between(draft), draft.asks, strict=True)
        )
        if turns and self.known:
            ids, turns = [*ids, *turns[0].ids], (replace(turns[0], ids=()), *turns[1:])
        return Sample(
            real=self.real(draft, new_tokens),
            ids=tuple(ids),
            answers=draft.answers,
            gold=tuple(gold),
            depth=draft.depth,
            new_tokens=new_tokens,
            question=question,
            turns=turns,
            **named,
        )

    def _given(self, ask: Ask) -> tuple[int, ...]:
        return self.ids(f" {', '.join(ask.answers)}") if self.gold else ()

    def encode(self, draft: Draft) -> tuple[list[int], list[tuple[int, int]], int]:
        """Ids, the span of them that touches each gold needle, and where the question starts."""
        prompt = self.text(draft)
        start = prompt.rindex(draft.context)
        coded = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        spans = []
        for low, high in draft.gold:
            touched = [
                i
                for i, (a, b) in enumerate(coded.offset_mapping)
                if a < start + high and b > start + low and b > a
            ]
            spans.append((touched[0] + len(self.bos), touched[-1] + 1 + len(self.bos)))
        end = start + len(draft.context)
        after = (i for i, (_, b) in enumerate(coded.offset_mapping) if b > end)
        return self.bos + coded.input_ids, spans, next(after, len(coded.input_ids)) + len(self.bos)
