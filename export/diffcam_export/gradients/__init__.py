"""Reverse-mode differentiation of an ONNX graph, rule by rule."""
