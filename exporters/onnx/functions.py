"""The ONNX operators of domain ``sparse_rt`` as model-local functions made of standard operators.

    BitmaskLinear (x [..., K], values [nnz], mask [N, ceil(K/8)] uint8, row_offsets [N+1] int32) -> y [..., N]
    Sparse24Linear(x [..., K], values [N, K/2], meta [N, ceil(K/8)] uint8)                       -> y [..., N]
    BitmaskLinearQ(x, values [nnz] int8, mask, row_offsets, scales [N, G] float32)               -> y [..., N]
    DenseLinear   (x [..., K], weight [N, K])                                                    -> y [..., N]

Attribute ``in_features`` is K; y has the dtype of x, sums are float32. A runtime that has a kernel of that name uses
it, every other one runs the body. BitmaskLinearQ multiplies a value with the scale of its row (``group_size`` 0, G = 1)
or of its ``group_size`` columns; with ``accuracy_level`` 4 a kernel may round x to int8 as well, which the body never
does (the attribute of ONNX Runtime's MatMulNBits). DenseLinear is for layers that are not compressed: ONNX Runtime has
no product with bfloat16 on a CPU, and widens and transposes such a weight into a copy of twice its size while it opens
the file.

The bodies of the compressed ones look a metadata byte up in small tables: which of its eight columns are
kept, and at which value, counted from the first value of the byte. Columns that are not kept point one value *before*
that: never out of range (index -1 is the last value), so no clamp and no padding is needed.

``folding``    everything depends on constants only, so ONNX Runtime decompresses once at load and runs a dense MatMul.
``streaming``  a Scan decompresses and multiplies 64 rows at a time; ONNX Runtime never folds a Scan, so the weights
               stay compressed in memory and every call pays for the decompression.

``NonZero`` and ``ScatterND`` would be shorter, but their output shape depends on the data: ONNX Runtime refuses to
fold those.
"""

from __future__ import annotations

import onnx
import onnx.parser

DOMAIN = "sparse_rt"
VERSION = 1
BODIES = ("folding", "streaming")
# Rows of one Scan step. From 8 to 512 rows a 4096 x 4096 weight takes the same time within 10%; 64 keep the
# intermediates of a step at about 8 MB.
BLOCK_ROWS = 64

DENSE, QUANTIZED = "DenseLinear", "BitmaskLinearQ"

_INPUTS = {
    "BitmaskLinear": "x, values, mask, row_offsets",
    "Sparse24Linear": "x, values, meta",
    QUANTIZED: "x, values, mask, row_offsets, scales",
    DENSE: "x, weight",
}
_ATTRIBUTES = {QUANTIZED: "in_features, group_size, accuracy_level"}

_COMMON = """
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  axis0 = Constant <value_ints = [0]> ()
  axis1 = Constant <value_ints = [1]> ()
  last = Constant <value_ints = [-1]> ()
  byte_values = Constant <value_int = 256> ()
  byte_range = Range (zero, byte_values, one)
  byte_i32 = Cast <to = 6> (byte_range)
  byte = Unsqueeze (byte_i32, axis1)
  nowhere = Constant <value = int32[1] {-1}> ()
  rows = Shape <start = 0, end = 1> (METADATA)
  x_f32 = Cast <to = 1> (x)
"""

_IN_FEATURES = """
  in_features = Constant <value_int: int = @in_features> ()
"""

# The group of every column; the weights before they are scaled are called plain.
_GROUPS = """
  given = Constant <value_int: int = @group_size> ()
  whole_row = Equal (given, zero)
  group_columns = Where (whole_row, in_features, given)
  column = Range (zero, in_features, one)
  group = Div (column, group_columns)
"""
_SCALE = """
  SCALES_OF_ROWS
  wide_scales = Gather <axis = 1> (row_scales, group)
  weight = Mul (plain, wide_scales)"""

# kept [256, 8] bool, slot [256, 8] int32 (place of a kept column among the values of its byte), count [256] int32,
# row_start [N, 1] int32 (first value of a row), flat (the values in one dimension). All in int32 and without
# BitShift: ONNX Runtime 1.22 cannot compare uint8, and OpenVINO 2026.4 rounds when it shifts them.
_TABLES = {
    "BitmaskLinear": """
  bit_of_column = Constant <value = int32[8] {1, 2, 4, 8, 16, 32, 64, 128}> ()
  bit = BitwiseAnd (byte, bit_of_column)
  kept = Cast <to = 9> (bit)
  kept_i32 = Cast <to = 6> (kept)
  count = ReduceSum <keepdims = 0> (kept_i32, axis1)
  place = CumSum <exclusive = 1> (kept_i32, one)
  slot = Where (kept, place, nowhere)
  row_begins = Slice (row_offsets, axis0, last)
  row_start = Unsqueeze (row_begins, axis1)
  flat = Identity (values)
""",
    "Sparse24Linear": """
  first_bits = Constant <value = int32[8] {3, 3, 3, 3, 48, 48, 48, 48}> ()
  second_bits = Constant <value = int32[8] {12, 12, 12, 12, 192, 192, 192, 192}> ()
  first_of_column = Constant <value = int32[8] {0, 1, 2, 3, 0, 16, 32, 48}> ()
  second_of_column = Constant <value = int32[8] {0, 4, 8, 12, 0, 64, 128, 192}> ()
  pair = Constant <value = int32[8] {0, 0, 0, 0, 2, 2, 2, 2}> ()
  four = Constant <value = int32[1] {4}> ()
  first = BitwiseAnd (byte, first_bits)
  second = BitwiseAnd (byte, second_bits)
  first_raised = Mul (first, four)
  ordered = Less (first_raised, second)
  is_first = Equal (first, first_of_column)
  is_second = Equal (second, second_of_column)
  either = Or (is_first, is_second)
  kept = And (ordered, either)
  step = Cast <to = 6> (is_second)
  place = Add (pair, step)
  slot = Where (kept, place, nowhere)
  table_shape = Constant <value_ints = [256]> ()
  count = ConstantOfShape <value = int32[1] {4}> (table_shape)
  row_count = Squeeze (rows, axis0)
  row = Range (zero, row_count, one)
  per_row = Shape <start = 1, end = 2> (values)
  row_begins = Mul (row, per_row)
  row_begins_i32 = Cast <to = 6> (row_begins)
  row_start = Unsqueeze (row_begins_i32, axis1)
  flat = Reshape (values, last)
""",
}

# Metadata bytes META [r, b] and first values START [r, 1] of some rows -> weight_t [K, r] float32.
_DECOMPRESS = """
  index = Cast <to = 6> (META)
  byte_counts = Gather (count, index)
  before = CumSum <exclusive = 1> (byte_counts, one)
  byte_start = Add (before, START)
  byte_start_3d = Unsqueeze (byte_start, last)
  offset = Gather (slot, index)
  position = Add (byte_start_3d, offset)
  PICK
  is_kept = Gather (kept, index)
  nothing = Constant <value_float = 0.0> ()
  spread = Where (is_kept, picked, nothing)
  two_dimensions = Constant <value_ints = [0, -1]> ()
  RESHAPE
  weight_t = Transpose <perm = [1, 0]> (weight)
"""

_FOLDING = """
  flat_f32 = Cast <to = 1> (flat)
  DECOMPRESS
  y_f32 = MatMul (x_f32, weight_t)
  y = CastLike (y_f32, x)
"""

# The last block starts early when N is no multiple of the block, and its first columns are then cut off again: all
# blocks have one shape, as Scan wants, and the big inputs are only sliced, never reshaped (which would be folded into
# a second copy in memory). The Cast of the values stands behind the Gather for the same reason.
_STREAMING = """
  block_limit = Constant <value_ints = [BLOCK]> ()
  block = Min (rows, block_limit)
  block_less_one = Sub (block, axis1)
  rows_up = Add (rows, block_less_one)
  blocks = Div (rows_up, block)
  block_count = Squeeze (blocks, axis0)
  block_number = Range (zero, block_count, one)
  block_begin = Mul (block_number, block)
  last_begin = Sub (rows, block)
  begins = Min (block_begin, last_begin)
  tokens_shape = Concat <axis = 0> (last, columns)
  x_2d = Reshape (x_f32, tokens_shape)
  y_blocks = Scan <num_scan_inputs = 1, body = block_of_rows (int64 begin) => (float[?, ?] y_rows) {
    begin_1d = Unsqueeze (begin, axis0)
    end_1d = Add (begin_1d, block)
    meta_rows = Slice (METADATA, begin_1d, end_1d, axis0)
    start_rows = Slice (row_start, begin_1d, end_1d, axis0)
    DECOMPRESS
    y_rows = MatMul (x_2d, weight_t)
  }> (begins)
  by_token = Transpose <perm = [1, 0, 2]> (y_blocks)
  two_d = Constant <value_ints = [0, -1]> ()
  y_overlapping = Reshape (by_token, two_d)
  full_blocks = Sub (blocks, axis1)
  full_columns = Mul (full_blocks, block)
  y_full = Slice (y_overlapping, axis0, full_columns, axis1)
  rest = Sub (rows, full_columns)
  rest_begin = Neg (rest)
  end = Constant <value_ints = [9223372036854775807]> ()
  y_rest = Slice (y_overlapping, rest_begin, end, axis1)
  y_2d = Concat <axis = 1> (y_full, y_rest)
  lead = Shape <start = 0, end = -1> (x)
  y_shape = Concat <axis = 0> (lead, rows)
  y_f32 = Reshape (y_2d, y_shape)
  y = CastLike (y_f32, x)
"""

_DENSE_BODY = """
  x_f32 = Cast <to = 1> (x)
  weight_f32 = Cast <to = 1> (weight)
  weight_t = Transpose <perm = [1, 0]> (weight_f32)
  y_f32 = MatMul (x_f32, weight_t)
  y = CastLike (y_f32, x)
"""

_DOC = {
    "BitmaskLinear": "y = x W^T; W [N, in_features] keeps the weights whose bit is set in mask (bit j of byte b is "
    "column 8b+j); values holds them row by row, row_offsets the first of each row",
    "Sparse24Linear": "y = x W^T; W [N, in_features] keeps two of every four columns; a nibble of meta (low one first) "
    "holds the first kept column in bits 0-1 and the second in bits 2-3",
    QUANTIZED: "as BitmaskLinear; a value is multiplied with the scale of its row, or of group_size columns of it",
    DENSE: "y = x W^T; W [N, in_features] is stored as it is, in the dtype of the checkpoint",
}


def operator_of(pattern: str, values: str = "plain") -> str:
    """The operator that reads weights of ``pattern``; every pattern with a bitmask shares one, int8 values theirs."""
    if values == "int8":
        return QUANTIZED
    return "Sparse24Linear" if pattern == "2:4" else "BitmaskLinear"


def function(operator: str, body: str, opset: int, whole_bytes: bool) -> onnx.FunctionProto:
    """The function ``operator`` for a model of ``opset`` (the checker wants the same opset in both).

    ``whole_bytes`` promises that every in_features is a multiple of 8: nothing is cut off then, which spares four bytes
    a weight while folding.
    """
    lines = _DENSE_BODY if operator == DENSE else _sparse_body(operator, body, whole_bytes)
    attributes = _ATTRIBUTES.get(operator, "in_features")
    head = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{operator} <{attributes}> ({_INPUTS[operator]}) => (y)'
    proto = onnx.parser.parse_function(f"{head} {{{lines}}}")
    proto.doc_string = f"{_DOC[operator]}." if operator == DENSE else f"{_DOC[operator]}. Body: {body}."
    return proto


def _sparse_body(operator: str, body: str, whole_bytes: bool) -> str:
    template = {"folding": _FOLDING, "streaming": _STREAMING}[body]
    quantized = operator == QUANTIZED
    if body == "folding":
        decompress = _decompress("METADATA", "row_start", "picked = Gather (flat_f32, position)")
        scales = "row_scales = Identity (scales)"
    else:
        pick = "stored = Gather (flat, position)\n  picked = Cast <to = 1> (stored)"
        decompress = _decompress("meta_rows", "start_rows", pick)
        scales = "row_scales = Slice (scales, begin_1d, end_1d, axis0)"
    name = "plain" if quantized else "weight"
    reshape = f"{name} = Reshape (spread, two_dimensions)"
    if not whole_bytes:
        reshape = reshape.replace(name, "padded") + f"\n  {name} = Slice (padded, axis0, columns, axis1)"
    if quantized:
        reshape += _SCALE.replace("SCALES_OF_ROWS", scales)
    metadata = _INPUTS[operator].split(", ")[2]
    # Only where they are read: ONNX Runtime warns of a node without a reader.
    columns = "" if whole_bytes and body == "folding" else "  columns = Unsqueeze (in_features, axis0)\n"
    width = _IN_FEATURES if columns or quantized else ""
    tables = _TABLES["BitmaskLinear"] + _GROUPS if quantized else _TABLES[operator]
    lines = _COMMON + width + columns + tables + template.replace("DECOMPRESS", decompress)
    return lines.replace("RESHAPE", reshape).replace("METADATA", metadata).replace("BLOCK", str(BLOCK_ROWS))


def _decompress(metadata: str, start: str, pick: str) -> str:
    return _DECOMPRESS.replace("META", metadata).replace("START", start).replace("PICK", pick)
