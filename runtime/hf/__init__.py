"""The transformers integration; ``hook`` registers it, ``quantizer`` is it, ``load`` is the short way to a model."""
