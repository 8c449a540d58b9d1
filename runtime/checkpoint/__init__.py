"""Reading and writing model folders: headers, shards, index, manifest, and output folders that appear whole."""

from sparse_rt.checkpoint.config import FORMAT_VERSION, QUANT_METHOD, SparseConfig, matches
from sparse_rt.checkpoint.header import Header, TensorEntry, read_header
from sparse_rt.checkpoint.output import check_output, output_directory, partial_path
from sparse_rt.checkpoint.reader import (
    INDEX_NAME,
    MANIFEST_NAME,
    Checkpoint,
    SourceCheckpoint,
    WeightEntry,
    is_sparse_checkpoint,
    read_json,
    resolve_model,
)
from sparse_rt.checkpoint.shard import tensor_digest
from sparse_rt.checkpoint.writer import CheckpointWriter, file_digest, sparse_header, write_json

__all__ = [
    "FORMAT_VERSION",
    "INDEX_NAME",
    "MANIFEST_NAME",
    "QUANT_METHOD",
    "Checkpoint",
    "CheckpointWriter",
    "Header",
    "SourceCheckpoint",
    "SparseConfig",
    "TensorEntry",
    "WeightEntry",
    "check_output",
    "file_digest",
    "is_sparse_checkpoint",
    "matches",
    "output_directory",
    "partial_path",
    "read_header",
    "read_json",
    "resolve_model",
    "sparse_header",
    "tensor_digest",
    "write_json",
]
