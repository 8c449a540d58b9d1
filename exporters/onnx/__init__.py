"""ONNX export: one file whose weights stay compressed and that every ONNX Runtime can run."""
