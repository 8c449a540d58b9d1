"""Which compressed weights an adapter was trained on."""

from __future__ import annotations

import hashlib

from sparse_rt.checkpoint import MANIFEST_NAME, Checkpoint, read_json, tensor_digest


def base_digest(checkpoint: Checkpoint) -> str:
    """sha256 over name and digest of every compressed tensor, whatever the shards.

    The manifest's digests are used where it has them (`sparse-rt verify` compares those with the files); tensors it
    does not list, as in a folder that ``save_pretrained`` wrote, are read.
    """
    manifest = checkpoint.folder / MANIFEST_NAME
    known = read_json(manifest).get("tensors", {}) if manifest.is_file() else {}
    total = hashlib.sha256()
    for name in sorted(checkpoint.compressed_tensors()):
        digest = known.get(name) or tensor_digest(checkpoint.load(name))
        total.update(f"{name} {digest}\n".encode())
    return total.hexdigest()
