"""What the name of a model says about it, for commands that have not loaded PyTorch yet."""

from pathlib import PurePath


def names_onnx(spec: str) -> bool:
    """Whether a model's name is the path of an ONNX file.

    Example:
        >>> names_onnx("m.cam.onnx"), names_onnx("MODEL.ONNX"), names_onnx("timm:resnet18")
        (True, True, False)
    """
    return PurePath(spec).suffix.lower() == ".onnx"
