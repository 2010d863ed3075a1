"""What a page needs to answer clicks by itself: the mask decoder as a graph, and embeddings as it reads them.

The graph takes one prompt and gives the mask logits of the answer that `PromptableSystem.segment` takes, on their
low-resolution grid. The page maps points to the input, and logits to the image (`page/src/placing.ts`), so that the
cost does not depend on the size of the image.
"""

# safetensors and the protocol buffers of onnx have no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maskwright._version import __version__
from maskwright.errors import CheckpointError, DataError, MissingExtraError, UsageError
from maskwright.files import atomic_path
from maskwright.inference.exporting.networks import Convertible, convert
from maskwright.inference.exporting.prompted import canvas_of, slots_of
from maskwright.inference.exporting.running import open_session
from maskwright.structures import Embedding
from maskwright.systems.kinds.promptable import Features, PromptableSystem
from maskwright.web.embeddings import half

OUTPUTS = ("score", "mask_logits")
NEEDED = ("onnx", "onnxscript", "onnxruntime")
NO_SIZE = "the input of the system has no fixed size"
ABSENT = "the page cannot decode by itself, because the server has no maskwright[export]"
MOST = 64 << 20  # bytes of a graph that a page loads


class PageGraph(nn.Module):
    """From one prompt and an embedding to the predicted IoU (1,) and the mask logits (1, h, w) of the answer.

    Inputs are points (1, T, 2) in pixels of the input, labels (1, T) as in `export_prompted`, logits (1, 1, h, w) and
    has_logits (1,) for systems that read masks, and the tensors of the embedding with a batch axis.
    """

    def __init__(self, system: PromptableSystem):
        super().__init__()
        self.system = system

    def forward(self, points: Tensor, labels: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Answers a prompt."""
        system, logits, given, maps = self.system, None, None, list(tensors)
        canvas = canvas_of(system.preprocess)
        if system.reads_masks:
            logits, given, *maps = maps
        with Convertible():
            slots = slots_of(system, points, labels, logits, given, canvas)
            decoded = system.answer(Features(maps[0], tuple(maps[1:]), canvas), slots)
            single = ((labels == 0) | (labels == 1)).sum(1) <= 1
            ambiguous = single & ~(labels == 2).any(1)
            if given is not None:
                ambiguous = ambiguous & ~given
            found = system.choose(decoded, ambiguous, None)
            return found.scores[:, 0], found.logits[:, 0]


class PageDecoder:
    """The graph of a system, exported when a page first asks for it and kept on the disk.

    May be used from any thread.

    Args:
        system: A prepared system. Its decoder is copied, so that clicks can be answered while it is exported.
        folder: Where the graph is kept.
    """

    def __init__(self, system: PromptableSystem, folder: Path):
        self.system, self.folder = system, folder
        self._lock = threading.Lock()
        self._graph: bytes | None = None
        self._failed: str | None = None
        self._name: str | None = None

    @property
    def missing(self) -> str | None:
        """Why a page cannot decode; None if it can, as far as is known."""
        if self._failed is None and any(importlib.util.find_spec(name) is None for name in NEEDED):
            return ABSENT
        return self._failed

    @property
    def name(self) -> str:
        """Identifies the graph: system, options, weights of the decoder, and this version."""
        if self._name is None:
            system, digest = self.system, hashlib.sha256()
            about = {key: value for key, value in system.options.items() if key != "classes"}
            digest.update(json.dumps(about, sort_keys=True).encode())
            for network in _small_networks(system).values():
                for key, value in network.state_dict().items():
                    digest.update(key.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
            self._name = f"decoder-{system.name}-{__version__}-{digest.hexdigest()[:16]}"
        return self._name

    def graph(self) -> bytes:
        """Return the graph, an ONNX file.

        Raises:
            UsageError: If an extra is missing, or the decoder cannot be exported.
        """
        with self._lock:
            if self._graph is None:
                if self.missing is not None:
                    raise UsageError(self.missing)
                path = self.folder / f"{self.name}.onnx"
                try:
                    self._graph = path.read_bytes()
                except OSError:
                    self._graph = self._exported()
                    with contextlib.suppress(DataError, OSError), atomic_path(path, DataError) as part:
                        part.write_bytes(self._graph)
            return self._graph

    def _exported(self) -> bytes:
        try:
            return exported(self.system)
        except (CheckpointError, MissingExtraError, UsageError, RuntimeError) as error:
            self._failed = f"the page cannot decode by itself: {error}"
            raise UsageError(self._failed) from None

    def embedding(self, embedding: Embedding) -> bytes:
        """Return an embedding as a safetensors file with what the page has to know besides; values have 16 bits where
        their range allows.

        Raises:
            UsageError: If the input has another size than that of the graph.
        """
        from safetensors.torch import save

        system = self.system
        if embedding.input_size != canvas_of(system.preprocess):
            raise UsageError(NO_SIZE)
        about = {
            "placement": json.dumps(asdict(embedding.placement)),
            "input_size": json.dumps(list(embedding.input_size)),
            "resizing": json.dumps({"steps": system.steps, "cubic": system.cubic}),
            "reads_masks": json.dumps(system.reads_masks),
        }
        tensors = {name: value.detach().cpu() for name, value in half(embedding).tensors.items()}
        return save({name: value.contiguous() for name, value in tensors.items()}, about)


def exported(system: PromptableSystem) -> bytes:
    """Return the decoder of a prepared system as an ONNX file that its runtime computes as PyTorch does.

    Raises:
        UsageError: If torch cannot export it.
        CheckpointError: If the runtime computes something else.
    """
    graph = PageGraph(_without_encoder(system)).eval()
    names, example = _example(system)
    with torch.no_grad():
        own = graph(*example)
    slots = {1: torch.export.Dim.AUTO}
    dynamic: list[Any] = [slots, slots, *(None for _ in example[2:])]
    # `forward` takes the maps as further arguments, whose shapes are one tuple.
    shapes = (dynamic[0], dynamic[1], tuple(dynamic[2:]))
    what = f"{system.name}: the decoder"
    model, varying = convert(graph, example, shapes, names, OUTPUTS, what)
    if not (varying[0][1] and varying[1][1]):
        raise UsageError(f"{what} cannot be exported, because its number of points is fixed")
    data = model.SerializeToString()
    if len(data) > MOST:
        raise UsageError(f"{what} has {len(data) >> 20} MiB, more than the {MOST >> 20} MiB that a page loads")
    given = {name: value.numpy() for name, value in zip(names, example, strict=True)}
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "decoder.onnx"
            path.write_bytes(data)
            found = open_session(path)(given)
    except MissingExtraError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{what} cannot be computed by ONNX Runtime ({reason})") from None
    for name, value in zip(OUTPUTS, own, strict=True):
        apart = float(np.abs(found[name] - value.numpy()).max())
        if not apart <= 1e-3 * max(1.0, float(value.abs().max())):
            raise CheckpointError(f"{what} differs from PyTorch by {apart:.2g} in {name}")
    return data


def _small_networks(system: PromptableSystem) -> dict[str, nn.Module]:
    """The networks besides the image encoder."""
    return {name: network for name, network in system.named_children() if name != "image_encoder"}


def _without_encoder(system: PromptableSystem) -> PromptableSystem:
    """A copy on the host in float32 without the image encoder. Tracing replaces parameters for a while."""
    light = copy.copy(system)
    light.__dict__["_modules"] = {
        name: copy.deepcopy(network).cpu().float() for name, network in _small_networks(system).items()
    }
    light.uniform = True
    return light


def _example(system: PromptableSystem) -> tuple[list[str], tuple[Tensor, ...]]:
    """Names and examples of the inputs: a box with a point beside it and a mask, on an empty image."""
    batch = system.preprocess.collate([system.preprocess.match_channels(torch.zeros(3, 64, 64, dtype=torch.uint8))])
    embedding = system.embed(batch.images, batch.placements)[0]
    canvas = canvas_of(system.preprocess)
    if embedding.input_size != canvas:
        raise UsageError(NO_SIZE)
    maps = {name: value[None].float().cpu() for name, value in embedding.tensors.items()}
    points = torch.tensor([[[8.0, 9.0], [canvas[1] / 2, canvas[0] / 2], [1.0, 2.0]]])
    names, example = ["points", "labels"], [points, torch.tensor([[2, 3, 0]])]
    if system.reads_masks:
        height, width = maps["image"].shape[-2:]
        names += ["logits", "has_logits"]
        example += [torch.linspace(-8, 8, 4 * width).expand(1, 1, 4 * height, -1).contiguous(), torch.tensor([True])]
    return [*names, *maps], (*example, *maps.values())
