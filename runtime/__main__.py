"""``python -m sparse_rt`` is the ``sparse-rt`` command."""

from sparse_rt.tools.cli import main

if __name__ == "__main__":
    main()
