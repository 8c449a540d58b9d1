"""GPU kernels in Triton; nothing here is imported before a GPU (or the interpreter) is used."""
