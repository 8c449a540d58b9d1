"""``quantization_config`` of a sparse-rt ``config.json``: which pattern every linear weight has."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sparse_rt.errors import FormatError
from sparse_rt.formats import get_format
from sparse_rt.version import __version__

QUANT_METHOD = "sparse_rt"
FORMAT_VERSION = 1


def matches(name: str, pattern: str) -> bool:
    """Whether module ``name`` is meant by ``pattern``: the full name, its last parts, or a full match of ``re:...``."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return name == pattern or name.endswith("." + pattern)


def _known_pattern(pattern: Any) -> str:
    return get_format(pattern).pattern


Pattern = Annotated[str, BeforeValidator(_known_pattern)]


class Override(BaseModel):
    model_config = ConfigDict(extra="forbid")
    pattern: Pattern


class Producer(BaseModel):
    """Who wrote the folder. An object with ``name``, because vLLM reads that key of every quantization_config."""

    model_config = ConfigDict(extra="forbid")
    name: str = "sparse-rt"
    version: str = __version__

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


class SparseConfig(BaseModel):
    """Version 1. ``ignore`` names modules left dense, ``overrides`` gives single modules another pattern."""

    model_config = ConfigDict(extra="forbid")
    quant_method: str = QUANT_METHOD
    format_version: int = FORMAT_VERSION
    pattern: Pattern
    values: str = "plain"
    ignore: list[str] = Field(default_factory=list)
    overrides: dict[str, Override] = Field(default_factory=dict)
    producer: Producer = Field(default_factory=Producer)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SparseConfig:
        """Parse and check; ``FormatError`` for an unknown version, pattern, value storage or key."""
        if not isinstance(data, dict) or data.get("quant_method") != QUANT_METHOD:
            found = data.get("quant_method") if isinstance(data, dict) else None
            raise FormatError(
                f"config.json: quantization_config has quant_method {found!r}, a sparse-rt model has {QUANT_METHOD!r}; "
                "make one with `sparse-rt convert`"
            )
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise FormatError(
                f"config.json: format_version {version!r}, this build reads {FORMAT_VERSION}; "
                "install a newer sparse-rt or convert the model again"
            )
        try:
            config = cls(**data)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"])
            message = problem["msg"].removeprefix("Value error, ")  # pydantic's prefix to a UserError of ours
            raise FormatError(f"config.json: quantization_config.{where}: {message}") from error
        if config.values != "plain":
            raise FormatError(f"config.json: values are stored as {config.values!r}, this build reads 'plain'")
        return config

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump()

    def pattern_for(self, name: str) -> str | None:
        """Pattern of the linear weight of module ``name`` (without ".weight"), None when it is left dense."""
        if any(matches(name, pattern) for pattern in self.ignore):
            return None
        for pattern, override in self.overrides.items():
            if matches(name, pattern):
                return override.pattern
        return self.pattern
