"""The shapes of rows, and what a row of each is: a ``Document``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_rt.data import chat
from sparse_rt.data.chat import Message
from sparse_rt.data.sources import is_text_file, read_file, rows
from sparse_rt.errors import UserError

# Columns by which a shape is known, in the order in which they are looked for.
SHAPES = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt and completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
KNOWN = (
    "text | messages (role, content) | conversations (from, value) | prompt, completion | instruction, input, output"
)
# How a turn names its speaker and what is said.
_TURN = (("role", "content"), ("from", "value"))
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}

# The prompt of Stanford Alpaca, used for alpaca rows when the tokenizer brings no chat template.
_ALPACA = (
    "Below is an instruction that describes a task{also}. Write a response that appropriately completes the request."
)
_ALPACA_INPUT = ", paired with an input that provides further context"


@dataclass(frozen=True)
class Document:
    """The text of one row.

    ``messages`` when a chat template wrote the text (it brings its own special tokens), of which those in ``answers``
    (indexes) are the model's; otherwise the model's part begins at the character ``answer``, None for plain text.
    """

    where: str
    text: str
    answer: int | None = None
    messages: tuple[Message, ...] | None = None
    answers: tuple[int, ...] = ()

    @property
    def is_plain(self) -> bool:
        return self.answer is None and self.messages is None


def documents(source: str | Path, tokenizer) -> Iterator[Document]:
    """Every row of ``source`` that is not empty; ``UserError`` names the row that is not of the first row's shape."""
    if is_text_file(source):
        text = read_file(Path(source))
        if text.strip():
            yield Document(str(source), text)
        return
    shape = None
    for number, row in enumerate(rows(source), 1):
        where = f"{source}: row {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where} is {type(row).__name__}, expected an object with named columns ({KNOWN})")
        if shape is None:
            shape = _shape_of(row, source)
        missing = [name for name in SHAPES[shape] if name not in row]
        if missing:
            raise UserError(
                f"{where} lacks the column {', '.join(missing)}: the first row is of the shape {shape!r}, this one has "
                f"{', '.join(map(str, row)) or 'no columns'}; all rows of a data set have one shape"
            )
        document = _READ[shape](row, tokenizer, where)
        if document.text.strip():
            yield document


def _shape_of(row: dict[str, Any], source: str | Path) -> str:
    for shape, columns in SHAPES.items():
        if all(name in row for name in columns):
            return shape
    raise UserError(f"data set {source} has the columns {', '.join(map(str, row)) or '(none)'}; known are {KNOWN}")


def _text(value: Any, column: str, where: str) -> str:
    """A column that holds text; null, as tables write a missing cell, is the empty text."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: the column {column} is {type(value).__name__}, expected text")
    return value or ""


def _plain(row: dict[str, Any], tokenizer, where: str) -> Document:
    return Document(where, _text(row["text"], "text", where))


def _messages(row: dict[str, Any], tokenizer, where: str) -> Document:
    return _conversation(_turns(row["messages"], "messages", where), tokenizer, where)


def _conversations(row: dict[str, Any], tokenizer, where: str) -> Document:
    return _conversation(_turns(row["conversations"], "conversations", where), tokenizer, where)


def _turns(value: Any, column: str, where: str) -> list[Message]:
    """Turns written (role, content) or (from, value), with roles as chat templates name them."""
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise UserError(f"{where}: the column {column} is {found}, expected a list of turns")
    turns = []
    for number, part in enumerate(value, 1):
        names = next(
            (n for n in (("role", "content"), ("from", "value")) if isinstance(part, dict) and n[0] in part), None
        )
        if names is None or names[1] not in part:
            found = f"the keys {', '.join(map(str, part))}" if isinstance(part, dict) else type(part).__name__
            raise UserError(f"{where}: turn {number} has {found}, expected role and content (or from and value)")
        role = part[names[0]]
        if not isinstance(role, str):
            raise UserError(f"{where}: the role of turn {number} is {type(role).__name__}, expected text")
        turns.append({"role": _ROLES.get(role, role), "content": _content(part[names[1]], f"{where}: turn {number}")})
    chat.check_roles([turn["role"] for turn in turns], where)
    return turns


def _content(content: Any, where: str) -> str:
    if isinstance(content, list):  # parts, as multimodal chats write them: only text can be trained on here
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise UserError(f"{where} has parts that are not text; only text can be trained on")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError(f"{where}: its content is {type(content).__name__}, expected text")
    return content


def _conversation(messages: list[Message], tokenizer, where: str, first: int = 0) -> Document:
    """A conversation whose assistant turns from the index ``first`` on are the model's answers."""
    text = chat.render(messages, tokenizer, where)
    answers = tuple(i for i, turn in enumerate(messages) if turn["role"] == "assistant" and i >= first)
    return Document(where, text, messages=tuple(messages), answers=answers)


def _prompt_completion(row: dict[str, Any], tokenizer, where: str) -> Document:
    """Two texts that are put together as they are, or two lists of turns."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise UserError(f"{where}: prompt and completion are of two kinds; both are text or both are lists of turns")
    if isinstance(prompt, list):
        turns = _turns([*prompt, *completion], "prompt", where)
        return _conversation(turns, tokenizer, where, first=len(prompt))
    prompt, completion = _text(prompt, "prompt", where), _text(completion, "completion", where)
    return Document(where, prompt + completion, answer=len(prompt))


def _alpaca(row: dict[str, Any], tokenizer, where: str) -> Document:
    """With a chat template one user and one assistant turn, otherwise the prompt of Stanford Alpaca."""
    instruction, given, output = (_text(row.get(name), name, where) for name in ("instruction", "input", "output"))
    if not instruction.strip():
        raise UserError(f"{where}: the column instruction is empty")
    if getattr(tokenizer, "chat_template", None) is not None:
        question = f"{instruction}\n\n{given}" if given else instruction
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
        return _conversation(turns, tokenizer, where)
    head = _ALPACA.format(also=_ALPACA_INPUT if given else "")
    context = f"\n\n### Input:\n{given}" if given else ""
    prompt = f"{head}\n\n### Instruction:\n{instruction}{context}\n\n### Response:\n"
    return Document(where, prompt + output, answer=len(prompt))


_READ = {
    "text": _plain,
    "messages": _messages,
    "conversations": _conversations,
    "prompt and completion": _prompt_completion,
    "alpaca": _alpaca,
}
