"""Counting what a protobuf holds before it is parsed.

Two bytes of a file become an object of some hundred bytes, so that a small file could take all of
the memory. Only the places where a list may be long are looked at: the model, its graph, functions.
"""

MOST_ENTRIES = 1_000_000
"""Nodes, weights, values and metadata together."""

_GRAPH_OF_MODEL = 7
_FUNCTION_OF_MODEL = 25


class WireError(ValueError):
    """Bytes that are no protobuf, or one with too many entries."""


def count_entries(content: memoryview) -> int:
    """The fields of an ONNX model, of its graph and its functions.

    Args:
        content: the file.

    Raises:
        WireError: it is truncated or garbled, or there are more than `MOST_ENTRIES`.
    """
    count = 0
    waiting = [(0, len(content), True)]
    while waiting:
        at, end, is_model = waiting.pop()
        while at < end:
            tag, at = _varint(content, at, end)
            number, kind = tag >> 3, tag & 7
            start = at
            if kind == 0:
                _, at = _varint(content, at, end)
            elif kind in (1, 5):
                at += 8 if kind == 1 else 4
            elif kind == 2:
                length, start = _varint(content, at, end)
                at = start + length
            else:
                raise WireError(f"it is not a protobuf: byte {start} has wire type {kind}")
            count += 1
            if at > end:
                raise WireError(f"it is truncated: {at - end} bytes are missing after byte {end}")
            if count > MOST_ENTRIES:
                raise WireError(f"it has more than {MOST_ENTRIES} entries")
            if is_model and kind == 2 and number in (_GRAPH_OF_MODEL, _FUNCTION_OF_MODEL):
                waiting.append((start, at, False))
    return count


def _varint(content: memoryview, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise WireError(f"it is no protobuf, or truncated, at byte {at}")
