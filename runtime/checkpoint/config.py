"""``quantization_config`` of a sparse-rt ``config.json``: which pattern every linear weight has."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats import get_format
from sparse_rt.formats.int8 import INT8, PLAIN, check_group_size
from sparse_rt.formats.wrapper import BLOCK_DIAGONAL
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
    """Version 1. ``ignore`` names modules left dense, ``overrides`` gives single modules another pattern.

    ``values`` says how the kept values of all compressed weights are stored: "plain" as they are, "int8" as integers
    with a scale for every ``group_size`` columns (None: for every row). ``wrapper`` says that every compressed weight
    is the core of a product with the matrices of a wrapper (``formats/wrapper.py``).
    """

    model_config = ConfigDict(extra="forbid")
    quant_method: str = QUANT_METHOD
    format_version: int = FORMAT_VERSION
    pattern: Pattern
    values: str = PLAIN
    group_size: int | None = None
    wrapper: str | None = None
    ignore: list[str] = Field(default_factory=list)
    overrides: dict[str, Override] = Field(default_factory=dict)
    producer: Producer = Field(default_factory=Producer)

    @field_validator("group_size", mode="before")
    @classmethod
    def _group_size(cls, group_size: Any, info: ValidationInfo) -> int | None:
        check_group_size(group_size)
        if group_size is not None and info.data.get("values") == PLAIN:
            raise UserError(f"it is {group_size}, and only values 'int8' have groups; remove it")
        return group_size

    @field_validator("wrapper", mode="before")
    @classmethod
    def _wrapper(cls, wrapper: Any, info: ValidationInfo) -> str | None:
        if wrapper not in (None, BLOCK_DIAGONAL):
            raise UserError(
                f"it is {wrapper!r}, this build reads {BLOCK_DIAGONAL!r}; install a newer sparse-rt or convert the "
                "model again"
            )
        if wrapper is not None and info.data.get("values") == INT8:
            raise UserError(f"it is {wrapper!r}, and only plain values have a wrapper; convert the model again")
        return wrapper

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
        values = data.get("values", PLAIN)
        if isinstance(values, str) and values not in (PLAIN, INT8):  # first: such values may bring keys of their own
            raise FormatError(
                f"config.json: values are stored as {values!r}, this build reads {PLAIN!r} and {INT8!r}; "
                "install a newer sparse-rt or convert the model again"
            )
        try:
            return cls(**data)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"])
            message = problem["msg"].removeprefix("Value error, ")  # pydantic's prefix to a UserError of ours
            raise FormatError(f"config.json: quantization_config.{where}: {message}") from error

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it.

        Without a ``group_size`` or ``wrapper`` that says nothing: older builds refuse keys that they do not know, and
        they shall read plain folders, and name ``values`` where that is all they do not understand.
        """
        return self.model_dump(exclude={key for key in ("group_size", "wrapper") if getattr(self, key) is None})

    def plain(self) -> SparseConfig:
        """The same weights with their values stored as they are."""
        return self.model_copy(update={"values": PLAIN, "group_size": None})

    def refuse_wrapper(self, what: str) -> None:
        """``UserError`` where the weights are wrapped; ``what`` begins the sentence: "the exporter X cannot ..."."""
        if self.wrapper is not None:
            raise UserError(
                f"{what} wrapped weights (wrapper {self.wrapper!r}, from --method armor): a product of three matrices "
                "each; make a dense model of it with `sparse-rt export --to dense`, or convert with another --method"
            )

    def pattern_for(self, name: str) -> str | None:
        """Pattern of the linear weight of module ``name`` (without ".weight"), None when it is left dense."""
        if any(matches(name, pattern) for pattern in self.ignore):
            return None
        for pattern, override in self.overrides.items():
            if matches(name, pattern):
                return override.pattern
        return self.pattern
