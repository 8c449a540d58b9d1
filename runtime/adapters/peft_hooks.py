"""The two places where PEFT offers no public way in; everything else goes through its documented classes.

1. ``PeftType`` is a closed enum: ``register_peft_method`` wants a member of it, ``load_adapter`` reads its ``.value``.
2. ``BaseTuner._replace_module`` copies ``child.weight``, which a compressed layer does not have.
"""

from __future__ import annotations

import enum
from typing import Any

from torch import nn

from sparse_rt.errors import UserError

SUPPORTED = (0, 21), (0, 22)


def check_version() -> None:
    """``UserError`` for a PEFT release that these touches were not tested with."""
    import peft

    found = tuple(int(part) for part in peft.__version__.split(".")[:2])
    if not SUPPORTED[0] <= found < SUPPORTED[1]:
        low, high = (".".join(map(str, version)) for version in SUPPORTED)
        raise UserError(
            f"sparse-rt adapters need peft >= {low}, < {high}, found {peft.__version__}; "
            'install it with: pip install "sparse-rt[train]"'
        )


def add_enum_member(cls: type[enum.Enum], name: str) -> Any:
    """The member ``name`` of a ``str`` enum, added at run time when it is new; its value is its name.

    Python offers no public call for it. These attributes are the same in 3.10 to 3.14; from 3.11 on members are class
    attributes too, before that they are found through ``_member_map_``.
    """
    if name in cls.__members__:
        return cls[name]
    member = str.__new__(cls, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = cls
    member._sort_order_ = len(cls._member_names_)
    # type.__setattr__: EnumMeta's own refuses attributes once the name is a member.
    type.__setattr__(cls, name, member)
    cls._member_names_.append(name)
    cls._member_map_[name] = member
    cls._value2member_map_[name] = member
    return member


def register_tuner(cls) -> None:
    """Make the tuner ``cls`` (``name``, ``prefix``, ``config_cls``) a PEFT method; doing it twice is harmless."""
    from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftType
    from peft.utils import register_peft_method

    check_version()
    peft_type = add_enum_member(PeftType, cls.name.upper())
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type)
    if known is None:
        register_peft_method(name=cls.name, config_cls=cls.config_cls, model_cls=cls, prefix=cls.prefix)
    elif known.__qualname__ != cls.__qualname__:
        raise UserError(f"PEFT knows another method called {cls.name!r} ({known.__module__}.{known.__qualname__})")


class ReplaceWithoutWeight:
    """Mix-in for a ``BaseTuner``: swap a module in or out without touching ``.weight``.

    Adapter parameters are created on the device of the values, so there is nothing to move either.
    """

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)
