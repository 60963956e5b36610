"""What would be done with an ONNX file, in the words of `diffcam inspect`."""

from pathlib import Path

from diffcam_export.analysis import analyse
from diffcam_export.flow import dims
from diffcam_export.images import image_axes
from diffcam_export.reading import read_onnx
from diffcam_fast.analysis import Candidate, Inspection
from diffcam_fast.layout import Layout


def inspect_onnx(path: Path, *, layer: str | None = None, logits: str | None = None) -> Inspection:
    """Reads and analyses an ONNX file; nothing is written.

    Args:
        path: the file.
        layer: name of a tensor to look at in place of the one that is found.
        logits: name of the output with the logits, where there are several.

    Returns:
        The names in it are those of tensors; a size that the file leaves free is a name, or `?`.

    Raises:
        ValueError: it is no image classifier; the message names the node.
    """
    graph = read_onnx(path).graph
    found = analyse(graph, layer=layer, logits=logits)
    shape = dims(found.layer)
    assert shape is not None
    c, h, w = (3, 1, 2) if found.channel_axis == 3 else (1, 2, 3)
    images = dims(graph.inputs[0]) or ("?",) * 4
    channels, height, width = image_axes(graph.inputs[0])
    return Inspection(
        layer=str(found.layer.name),
        shape=(shape[c], shape[h], shape[w]),
        layout=Layout(found.channel_axis),
        head=found.head,
        closed_form=found.weight is not None,
        reason=found.reason,
        weight=None if found.weight is None else found.weight.name,
        probabilities=found.probabilities,
        candidates=tuple(Candidate(c.name, c.shape, c.note) for c in found.candidates),
        input_shape=(images[channels], images[height], images[width]),
    )
