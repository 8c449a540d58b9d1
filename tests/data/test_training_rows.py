"""Rows to train on: which tokens are learnt, what is packed together, what is set aside; and every wrong shape."""

import json

import pytest

from sparse_rt import data
from sparse_rt.errors import UserError

pytest.importorskip("datasets")

# As ChatML: a generation prompt, no tags.
PREFIX = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TAGGED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
NO_PROMPT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
# Drops all answers but the last, as templates of reasoning models drop earlier thoughts.
FORGETS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = [("user", "Add 1 2"), ("assistant", "It is 3."), ("user", "And 4?"), ("assistant", "Then 7.")]
MESSAGES = {"messages": [{"role": role, "content": content} for role, content in TURNS]}
SHAREGPT = {
    "conversations": [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in TURNS]
}
ALPACA = {"instruction": "Add", "input": "1 2", "output": "It is 3."}


def learnt(tokenizer, row):
    """The learnt tokens of a row as texts, one for each stretch."""
    stretches, before = [], False
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, -100)
        if label != -100:
            stretches = stretches if before else [*stretches, []]
            stretches[-1].append(token)
        before = label != -100
    return [tokenizer.decode(stretch) for stretch in stretches]


def only_row(path, tokenizer, length=64, **options):
    (row,) = data.training_dataset(path, tokenizer, length, **options)
    return row


@pytest.mark.parametrize("template", [PREFIX, TAGGED, NO_PROMPT], ids=["generation prompt", "tags", "neither"])
@pytest.mark.parametrize("shape", [MESSAGES, SHAREGPT], ids=["messages", "conversations"])
def test_every_assistant_turn_is_learnt_and_nothing_else(jsonl, with_template, template, shape):
    tokenizer = with_template(template)
    row = only_row(jsonl(shape), tokenizer, completion_only=True)
    eos = tokenizer.eos_token
    assert learnt(tokenizer, row) == [f"It is 3.{eos}", f"Then 7.{eos}"]
    assert row["input_ids"] == only_row(jsonl(shape), tokenizer)["input_ids"], "the tokens are those of the full loss"


def test_answers_of_alpaca_and_prompt_completion_rows(jsonl, tokenizer, with_template):
    eos = tokenizer.eos_token
    chat = with_template(PREFIX)
    for given in (tokenizer, chat):
        row = only_row(jsonl(ALPACA), given, 128, completion_only=True)
        assert learnt(given, row) == [f"It is 3.{eos}"]
    pair = {"prompt": "def add(a, b):\n    return", "completion": " a + b\n"}
    row = only_row(jsonl(pair), tokenizer, completion_only=True)
    assert learnt(tokenizer, row) == [f" a + b\n{eos}"]
    assert tokenizer.decode(row["input_ids"]) == f"{pair['prompt']}{pair['completion']}{eos}"
    turns = {"prompt": MESSAGES["messages"][:3], "completion": MESSAGES["messages"][3:]}
    for template in (PREFIX, TAGGED):
        chat = with_template(template)
        row = only_row(jsonl(turns), chat, completion_only=True)
        assert learnt(chat, row) == [f"Then 7.{eos}"], "an answer inside of the prompt belongs to the prompt"


def test_rows_without_a_learnt_token_are_left_out_and_counted(jsonl, with_template):
    tokenizer, notes = with_template(PREFIX), []
    long = {"messages": [{"role": "user", "content": "x = 1\n" * 40}, {"role": "assistant", "content": "y"}]}
    path = jsonl(MESSAGES, long, MESSAGES)
    rows = data.training_dataset(path, tokenizer, 64, completion_only=True, note=notes.append)
    assert len(rows) == 2 and "1 of 3 rows are left out" in notes[0]
    with pytest.raises(UserError, match="nothing to learn in its 1 rows"):
        data.training_dataset(jsonl(long), tokenizer, 64, completion_only=True)


def test_a_template_that_rewrites_earlier_turns_is_refused(jsonl, with_template):
    with pytest.raises(UserError, match=r"writes turn 2 differently .*generation %} tags"):
        data.training_dataset(jsonl(MESSAGES), with_template(FORGETS), 64, completion_only=True)
    single = {"messages": MESSAGES["messages"][:2]}
    assert learnt(with_template(FORGETS), only_row(jsonl(single), with_template(FORGETS), completion_only=True))


def test_packing_keeps_every_piece_whole_and_starts_positions_again(jsonl, tokenizer):
    texts = [f"x = {'1 + ' * (7 * i % 11)}1\n" for i in range(20)]
    path = jsonl(*({"text": text} for text in texts))
    plain = data.training_dataset(path, tokenizer, 48)
    packed = data.training_dataset(path, tokenizer, 48, packing=True)
    assert packed.column_names == ["input_ids", "labels", "position_ids"]
    pieces = []
    for row in packed:
        assert len(row["input_ids"]) <= 48
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        for start, stop in zip(starts, [*starts[1:], None], strict=True):
            piece, labels = row["input_ids"][start:stop], row["labels"][start:stop]
            assert row["position_ids"][start:stop] == list(range(len(piece)))
            assert labels == [-100, *piece[1:]], "no piece is predicted from another"
            pieces.append(piece)
    assert sorted(pieces) == sorted(plain["input_ids"])
    tokens = sum(map(len, plain["input_ids"]))
    assert len(packed) <= tokens / 48 * 1.1 + 1, "few rows, nearly full"


def test_packing_is_the_same_for_the_same_seed(jsonl, tokenizer):
    path = jsonl(*({"text": f"y = {i}\n" * (i % 5 + 1)} for i in range(20)))
    one, again, other = (data.training_dataset(path, tokenizer, 32, s, packing=True)["input_ids"] for s in (0, 0, 1))
    assert one == again and one != other


@pytest.mark.parametrize("packing", [False, True])
def test_a_fraction_is_set_aside_whole_texts_at_a_time(jsonl, tokenizer, packing):
    path = jsonl(*({"text": f"name_{i} = {i}\n" * 12} for i in range(20)))
    train, held_out = data.training_split(path, tokenizer, 32, eval_fraction=0.2, packing=packing)
    seen = [
        {word for row in part["input_ids"] for word in tokenizer.decode(row).split() if "name_" in word}
        for part in (train, held_out)
    ]
    assert len(seen[1]) == 4 and not seen[0] & seen[1]
    again, _ = data.training_split(path, tokenizer, 32, eval_fraction=0.2, packing=packing)
    assert train["input_ids"] == again["input_ids"]
    assert data.training_split(path, tokenizer, 32)[1] is None


def test_of_a_single_text_the_end_is_set_aside(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("".join(f"v{i} = {i}\n" for i in range(100)))
    train, held_out = data.training_split(tmp_path / "a.txt", tokenizer, 32, eval_fraction=0.1)
    first, last = ("".join(map(tokenizer.decode, part["input_ids"])) for part in (train, held_out))
    assert "v0 =" in first and "v99 =" in last
    assert len(held_out) == pytest.approx(0.1 * (len(train) + len(held_out)), abs=1)
    (tmp_path / "b.txt").write_text("one line\n")
    with pytest.raises(UserError, match="a single sequence; eval_fraction needs more"):
        data.training_split(tmp_path / "b.txt", tokenizer, 32, eval_fraction=0.1)


def turns(*roles):
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


BAD = {
    "no columns": ([{}], {}, r"columns \(none\); known are text"),
    "unknown columns": ([{"question": "a", "answer": "b"}], {}, "columns question, answer; known are text"),
    "half of a shape": ([{"instruction": "a"}], {}, "columns instruction; known are"),
    "prompt alone": ([{"prompt": "a"}], {}, "columns prompt; known are"),
    "mixed shapes": (
        [{"text": "a"}, MESSAGES],
        {},
        "row 2 lacks the column text: the first row is of the shape 'text'",
    ),
    "mixed pair": ([{"prompt": "a", "completion": []}], {}, "prompt and completion are of two kinds"),
    "no rows": ([], {}, "holds no text to train on"),
    "empty texts": ([{"text": ""}, {"text": None}], {}, "holds no text to train on"),
    "one token": ([{"text": "x"}], {"length": 1}, "nothing to learn in its 1 rows .*at least 2 and at most 1 tokens"),
    "number for text": ([{"text": 3}], {}, "row 1: the column text is int, expected text"),
    "list for text": ([{"text": ["a", "b"]}], {}, "the column text is list, expected text"),
    "list of texts": (["one", "two"], {}, "row 1 is str, expected an object with named columns"),
    "number for output": ([{"instruction": "a", "output": 3}], {}, "the column output is int, expected text"),
    "empty instruction": ([{"instruction": " ", "output": "b"}], {}, "the column instruction is empty"),
    "no turns": ([{"messages": []}], {}, "messages is an empty list, expected a list of turns"),
    "text for turns": ([{"messages": "hello"}], {}, "messages is str, expected a list of turns"),
    "turns of text": ([{"messages": ["hello"]}], {}, "turn 1 has str, expected role and content"),
    "turns in turns": ([{"messages": [[{"role": "user", "content": "x"}]]}], {}, "turn 1 has list, expected role"),
    "turn without content": ([{"messages": [{"role": "user"}]}], {}, "turn 1 has the keys role, expected role and"),
    "content in a dict": ([{"messages": [{"role": "user", "content": {"a": 1}}]}], {}, "turn 1: its content is dict"),
    "an image": ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], {}, "parts that are not text"),
    "role that is no text": ([{"messages": [{"role": 1, "content": "x"}]}], {}, "the role of turn 1 is int"),
    "unknown role": ([turns("user", "robot")], {}, "turn 2 has the role 'robot'; known are system, developer, user"),
    "unknown speaker": ([{"conversations": [{"from": "cat", "value": "x"}]}], {}, "turn 1 has the role 'cat'"),
    "two users": ([turns("user", "user", "assistant")], {}, "turns 1 and 2 are both user turns; join them"),
    "two answers": ([turns("user", "assistant", "assistant")], {}, "turns 2 and 3 are both assistant turns"),
    "late system turn": ([turns("user", "system")], {}, "turn 2 is a system turn; only the first turn may be one"),
    "no template": ([MESSAGES], {"template": None}, "row 1: conversations need a tokenizer with a chat template"),
    "template refuses": (
        [turns("user")],
        {"template": "{{ raise_exception('only poems') }}"},
        r"row 1: the chat template refuses it \(only poems\)",
    ),
    "text, answers wanted": ([{"text": "a b"}], {"completion_only": True}, "row 1 is plain text, which has no prompt"),
    "no answer": ([turns("user")], {"completion_only": True}, "row 1 has no assistant turn"),
    "empty answer": ([{"prompt": "a", "completion": ""}], {"completion_only": True, "end": False}, "nothing to learn"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_rows_are_one_sentence(jsonl, with_template, name):
    rows, options, words = BAD[name]
    options = {"template": PREFIX, "length": 64, "end": True, **options}
    tokenizer = with_template(options.pop("template"))
    if not options.pop("end"):
        tokenizer.eos_token = None
    with pytest.raises(UserError, match=words):
        data.training_dataset(jsonl(*rows), tokenizer, options.pop("length"), **options)


def test_wrong_files_are_one_sentence(tmp_path, tokenizer):
    files = {
        "binary.jsonl": (bytes(range(256)), "not UTF-8"),
        "zeros.txt": (b"text\0\0\0more", "is a binary file: it holds zero bytes"),
        "model.safetensors": (b"\x08", "is of an unknown kind; give a file"),
        "broken.jsonl": (b'{"text": "a"}\n{"text"\n', "broken.jsonl, line 2: not valid JSON"),
        "broken.json": (b'[{"text": "a"},]', "broken.json, line 1: not valid JSON"),
        "table.parquet": (b"PAR0", "cannot be loaded"),
        "empty.jsonl": (b"", "holds no text"),
        "blank.txt": (b" \n\n", "holds no text"),
        "object.json": (json.dumps({"rows": []}).encode(), "has the columns rows; known are"),
    }
    for name, (content, words) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=words):
            data.training_dataset(tmp_path / name, tokenizer, 64)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be loaded"):
        data.training_dataset(tmp_path / "folder", tokenizer, 64)
