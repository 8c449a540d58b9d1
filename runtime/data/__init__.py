"""Text from files and data sets, as strings, as token windows, or as rows to train on.

A source is a ``.txt`` file (one text), a ``.jsonl``/``.json`` file, a table file (``.parquet``, ``.csv``) or folder, or
a hub data set ``NAME[:CONFIG[:SPLIT]]``; the last two are read by the package ``datasets``. Rows carry ``text``,
``messages`` (role, content), ``conversations`` (sharegpt: from, value), ``prompt`` and ``completion``, or
``instruction``, ``input``, ``output`` (alpaca).

``sources`` reads rows, ``shapes`` turns a row into a ``Document``, ``chat`` applies chat templates, ``texts`` and
``training`` make of documents what a workflow needs.
"""

from sparse_rt.data.texts import read_texts, token_windows
from sparse_rt.data.training import training_dataset, training_split

__all__ = ["read_texts", "token_windows", "training_dataset", "training_split"]
