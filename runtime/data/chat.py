"""Chat templates: a conversation as text, and which of its characters the model is to answer with."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sparse_rt.errors import UserError

Message = dict[str, str]
ROLES = ("system", "developer", "user", "assistant", "tool")
# The block that marks answers in templates of transformers.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def check_roles(roles: Sequence[str], where: str) -> None:
    """``UserError`` for unknown roles, a system turn in the middle, and a speaker who answers himself."""
    for place, role in enumerate(roles):
        if role not in ROLES:
            raise UserError(f"{where}: turn {place + 1} has the role {role!r}; known are {', '.join(ROLES)}")
        if role in ("system", "developer") and place > 0:
            raise UserError(f"{where}: turn {place + 1} is a {role} turn; only the first turn may be one")
        if role != "tool" and place > 0 and roles[place - 1] == role:
            raise UserError(f"{where}: turns {place} and {place + 1} are both {role} turns; join them into one")


def render(messages: Sequence[Message], tokenizer, where: str, **options) -> str:
    """The conversation as the tokenizer's chat template writes it."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            f"{where}: conversations need a tokenizer with a chat template, this one has none; use a "
            "tokenizer_config.json with `chat_template`, or data with the column `text`"
        )
    return _apply(messages, tokenizer, where, tokenize=False, **options)


def _apply(messages: Sequence[Message], tokenizer, where: str, **options):
    import jinja2

    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except (jinja2.TemplateError, ValueError) as error:
        raise UserError(f"{where}: the chat template refuses it ({' '.join(str(error).split())})") from error


def has_generation_tags(tokenizer) -> bool:
    template = getattr(tokenizer, "chat_template", None)
    return isinstance(template, str) and _GENERATION.search(template) is not None


def answered_tokens(messages: Sequence[Message], tokenizer, where: str) -> tuple[list[int], list[bool]]:
    """(token ids, whether the model answers with the token), by the template's own generation tags."""
    options = dict(tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    found = _apply(messages, tokenizer, where, **options)
    return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]


def answer_spans(messages: Sequence[Message], answers: Sequence[int], tokenizer, where: str) -> list[tuple[int, int]]:
    """Character spans of the turns ``answers``, found by rendering the conversation up to each of them.

    A turn begins where the generation prompt ends, as when the model is asked, and ends where the conversation up to
    it ends. ``UserError`` when the template writes a turn differently once others follow: then no prefix can tell.
    """
    text, spans = render(messages, tokenizer, where), []
    for index in answers:
        before = render(messages[:index], tokenizer, where) if index else ""
        asked = render(messages[:index], tokenizer, where, add_generation_prompt=True) if index else ""
        through = render(messages[: index + 1], tokenizer, where)
        start = len(asked)
        if text.startswith(through) and through.startswith(before) and asked == before:
            # A template without a generation prompt: the header of the turn is not the model's, its content is.
            start = through.find(messages[index]["content"].strip(), len(before))
        if start < 0 or not (text.startswith(through) and through.startswith(asked)):
            raise UserError(
                f"{where}: the chat template writes turn {index + 1} differently when the conversation goes on, so its "
                "tokens cannot be found; use a template with {% generation %} tags, conversations of one answer, or "
                "leave out completion_only"
            )
        spans.append((start, len(through)))
    return spans
