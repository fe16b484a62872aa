"""Files are written here by the field numbers of onnx.proto3, so that no onnx package is needed."""

import numpy as np
from onnx_weights import Node, read_graph


def varint(value: int) -> bytes:
    found = b""
    while value > 0x7F:
        found += bytes([value & 0x7F | 0x80])
        value >>= 7
    return found + bytes([value])


def field(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensor(name: str, values: np.ndarray, *, packed: bool) -> bytes:
    dims = [varint(size) for size in values.shape]
    shape = field(1, b"".join(dims)) if packed else b"".join(field(1, s) for s in values.shape)
    kind = field(2, 1 if values.dtype == np.float32 else 7)
    return shape + kind + field(8, name.encode()) + field(9, values.tobytes())


def test_weights_and_nodes_are_read():
    large = np.arange(600, dtype=np.float32).reshape(2, 300)
    small = np.array([0.5], np.float32)
    whole_numbers = np.arange(3)
    node = b"".join(field(1, name) for name in (b"x", b"w")) + field(2, b"y") + field(4, b"MatMul")
    graph = (
        field(1, node)
        + field(2, b"main")
        + field(5, tensor("w", large, packed=True))
        + field(5, tensor("b", small, packed=False))
        + field(5, tensor("shape", whole_numbers, packed=True))
    )
    model = field(1, 8) + varint(3 << 3 | 5) + b"1234" + field(7, graph)
    weights, nodes = read_graph(model)
    assert set(weights) == {"w", "b"}
    np.testing.assert_array_equal(weights["w"], large)
    np.testing.assert_array_equal(weights["b"], small)
    assert nodes == [Node("MatMul", ("x", "w"), ("y",))]
