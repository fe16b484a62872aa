"""Read the weights and nodes of an ONNX file with nothing but the standard library and numpy.

ONNX is protobuf; of its many messages only four are needed here (onnx.proto3 of the ONNX project:
ModelProto.graph = 7; GraphProto.node = 1, initializer = 5; NodeProto.input = 1, output = 2,
op_type = 4; TensorProto.dims = 1, data_type = 2, name = 8, raw_data = 9). Weights must be fp32 in
`raw_data`, as torch's exporter writes them; others are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

_FLOAT = 1


@dataclass(frozen=True)
class Node:
    """One operation of the graph."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_graph(content: bytes) -> tuple[dict[str, np.ndarray[Any, Any]], list[Node]]:
    """Weights by name, and the nodes in order."""
    (graph,) = (value for field, value in _fields(content) if field == 7)
    weights: dict[str, np.ndarray[Any, Any]] = {}
    nodes: list[Node] = []
    for field, value in _fields(graph):
        if field == 1:
            nodes.append(_node(value))
        elif field == 5 and (found := _tensor(value)):
            weights[found[0]] = found[1]
    return weights, nodes


def _node(content: Any) -> Node:
    parts: dict[int, list[str]] = {1: [], 2: [], 4: []}
    for field, value in _fields(content):
        if field in parts:
            parts[field].append(bytes(value).decode())
    return Node(parts[4][0], tuple(parts[1]), tuple(parts[2]))


def _tensor(content: Any) -> tuple[str, np.ndarray[Any, Any]] | None:
    shape: list[int] = []
    kind, name, raw = 0, "", None
    for field, value in _fields(content):
        if field == 1:
            shape += [value] if isinstance(value, int) else list(_packed(value))
        elif field == 2:
            kind = value
        elif field == 8:
            name = bytes(value).decode()
        elif field == 9:
            raw = value
    if kind != _FLOAT or raw is None:
        return None
    return name, np.frombuffer(raw, "<f4").reshape(shape)


def _fields(content: Any) -> Iterator[tuple[int, Any]]:
    """Number and value of every field: an int, or a view of the bytes of what has a length."""
    view, at = memoryview(content), 0
    while at < len(view):
        key, at = _varint(view, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(view, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None:
            size, at = _varint(view, at)
        yield key >> 3, view[at : at + size]
        at += size


def _packed(view: Any) -> Iterator[int]:
    at = 0
    while at < len(view):
        value, at = _varint(view, at)
        yield value


def _varint(view: Any, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
