"""``overrides`` of config.json for the weights whose pattern is not the model's."""

from __future__ import annotations

import re

from sparse_rt.checkpoint.config import Override


def compact_overrides(patterns: dict[str, str]) -> dict[str, Override]:
    """Modules (full name -> pattern) as few entries of config.json: one for the blocks that are alike.

    An entry names its modules exactly, with or without the prefix of the base model, and no other.
    """
    blocks: dict[tuple[str, str, str], list[str]] = {}  # (pattern, name of the list, block) -> names inside
    outside: dict[str, Override] = {}
    for name, pattern in patterns.items():
        match = re.fullmatch(r"(.+?)\.(\d+)\.(.+)", name)
        if match is None:  # in no numbered block, such as a head
            outside[rf"re:(.*\.)?{re.escape(name)}"] = Override(pattern=pattern)
            continue
        blocks.setdefault((pattern, match[1], match[2]), []).append(match[3])
    alike: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for (pattern, head, number), names in blocks.items():
        alike.setdefault((pattern, head, tuple(sorted(names))), []).append(number)
    overrides = outside
    for (pattern, head, names), numbers in alike.items():
        inside = "|".join(map(re.escape, names))
        overrides[rf"re:(.*\.)?{re.escape(head)}\.({'|'.join(numbers)})\.({inside})"] = Override(pattern=pattern)
    return overrides
