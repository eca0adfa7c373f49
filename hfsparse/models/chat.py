"""What a chat template puts around the texts of a conversation.

    before, after = frames(tokenizer)  # around a user's text; `after` goes up to the answer

Texts never pass through a template, which may strip or drop them: marks do, and what comes out is
cut where they stand.
"""

from __future__ import annotations

import re
from itertools import cycle

from hfsparse.errors import UsageError, first_line


def frames(tokenizer, turns: int = 1, thinking: bool = False) -> list[str]:
    """The `turns + 1` pieces before, between and after the texts of so many turns.

    Users and assistants take turns, a user has the first and the last. Without `thinking`, models
    that can think first are told to answer at once. Texts are given as strings, or as lists of
    parts to templates that know only these. UsageError where neither comes out whole.
    """
    marks = [f"{{{{text {i}}}}}" for i in range(turns)]
    more = {} if thinking else {"enable_thinking": False}
    problems = []
    for content in (str, _parts):
        said = zip(cycle(("user", "assistant")), marks, strict=False)
        turned = [{"role": role, "content": content(mark)} for role, mark in said]
        try:
            text = tokenizer.apply_chat_template(
                turned, tokenize=False, add_generation_prompt=True, **more
            )
        except Exception as problem:  # jinja2's, a template's own, Python's within one
            problems.append(f"it ends in {first_line(problem)!r}")
            continue
        if re.findall(r"{{text \d+}}", text) == marks:
            return re.split(r"{{text \d+}}", text)
        problems.append("it loses or moves them")
    raise UsageError(
        f"this tokenizer's chat template can't be used for {turns} turn{'s' * (turns > 1)} of text "
        f"({problems[0]}; with texts as lists of parts {problems[1]}): give the tokenizer another "
        "chat_template, or None for plain text"
    )


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]
