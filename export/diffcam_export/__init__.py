"""ONNX models that explain themselves."""
