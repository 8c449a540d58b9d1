"""Importing this module makes every adapter known to PEFT; ``sparse_rt.hooks`` does it right after ``import peft``."""

from sparse_rt.adapters import peft_hooks, registry

peft_hooks.check_version()
registry.adapter_names()
