"""The transformers integration: ``quantizer`` is it, ``load`` is the short way to a model."""
