"""The promptable system behind the page: embeddings computed ahead, and answers to clicks and boxes.

Everything here may be called from several threads; the application gives clicks, the image that is shown and the images
that follow one thread each, so that no click waits for an encoder.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from maskwright.checkpoints.exported import is_exported
from maskwright.checkpoints.shipping import first_with
from maskwright.errors import UsageError
from maskwright.inference.preparing import chosen_device, prepare
from maskwright.inference.prompting import promptable
from maskwright.structures import Embedding, Masks, Prompts
from maskwright.systems import System
from maskwright.systems.kinds.promptable import PromptableSystem
from maskwright.web.decoding import PageDecoder
from maskwright.web.embeddings import LIMIT, EmbeddingStore
from maskwright.web.objects import is_number, read_any_mask, shown
from maskwright.web.sources import Source

HELD = 256 << 20  # bytes of embeddings in memory
MAX_POINTS = 256  # of a prompt
REMEMBERED = 64  # answers whose logits can be refined
PER_THREAD = 1 << 18  # numbers of an image embedding for which another thread pays in the decoder

Size = tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """What a person has asked for.

    Attributes:
        points: x, y and 1 (on the object) or 0 (outside of it).
        box: x0, y0, x1, y1; None without.
        counts: The mask to be improved, a compressed run-length string; None without.
    """

    points: tuple[tuple[float, float, int], ...] = ()
    box: tuple[float, float, float, float] | None = None
    counts: str | None = None


@dataclass(frozen=True)
class Answer:
    """The mask for a prompt.

    Attributes:
        counts: A compressed run-length string.
        score: The predicted IoU.
        stages: Milliseconds of the networks, and of making the mask from their logits.
    """

    counts: str
    score: float
    stages: tuple[float, float] = (0.0, 0.0)


def default_weights(clip: bool = False) -> Path | None:
    """Return the promptable weights that are installed with the library; None if there are none.

    Args:
        clip: Prefer weights that follow objects through a video.
    """
    found = (first_with("video") if clip else None) or first_with("prompts")
    return None if found is None else found.verified()


class Assistant:
    """A promptable system and the embeddings of a source.

    Args:
        source: The images.
        system: The system.
        folder: Where embeddings are stored between sessions.
        device: Where to compute; None: a GPU if there is one.
        dtype: Precision of the networks.
        limit: Most bytes of stored embeddings.

    Attributes:
        system: The prepared system.
        name: Its name.
        device: As given.
        dtype: As given.
        page_decoder: What pages need to answer prompts themselves.
    """

    def __init__(
        self,
        source: Source,
        system: System,
        folder: Path,
        device: str | None = None,
        dtype: str = "float32",
        limit: int = LIMIT,
    ):
        self.source, self.device, self.dtype = source, device, dtype
        self.system = promptable(prepare(promptable(system), device, dtype))
        self.name = system.name
        self.store = EmbeddingStore(folder, self.system.fingerprint, limit)
        # The decoder of an exported system has no weights from which that of the page could be made.
        self.page_decoder = None if is_exported(self.system) else PageDecoder(self.system, folder)
        self._lock = threading.Lock()
        self._held = OrderedDict[int, Embedding]()
        self._under_way = dict[int, Future[Embedding]]()
        self._logits = OrderedDict[tuple[int, str], Tensor]()

    # ---- embeddings --------------------------------------------------------------------------------------------------

    def is_ready(self, index: int) -> bool:
        """Return whether the embedding of an image is in memory."""
        with self._lock:
            return index in self._held

    def embedding(self, index: int) -> Embedding:
        """Return the embedding of an image: from memory, from the disk, or computed.

        Raises:
            ImageError: If the image cannot be read.
        """
        with self._lock:
            if index in self._held:
                self._held.move_to_end(index)
                return self._held[index]
            waiting, own = self._under_way.get(index), Future[Embedding]()
            if waiting is None:
                self._under_way[index] = own
        if waiting is not None:
            return waiting.result()
        try:
            embedding = self._computed(index)
        except BaseException as error:
            with self._lock:
                del self._under_way[index]
            own.set_exception(error)
            raise
        with self._lock:
            self._held[index] = embedding
            del self._under_way[index]
            while len(self._held) > 1 and sum(map(nbytes, self._held.values())) > HELD:
                self._held.popitem(last=False)
        own.set_result(embedding)
        return embedding

    def _computed(self, index: int) -> Embedding:
        content = self.source.content(index)
        embedding = self.store.get(content)
        if embedding is not None and embedding.image_size == self.source.size(index):
            return embedding.to(chosen_device(self.device, self.system))
        embedding = encoded(self.system, self.source.read(index))
        self.store.put(content, embedding)
        return embedding

    # ---- prompts -----------------------------------------------------------------------------------------------------

    def answer(self, index: int, prompt: Prompt) -> Answer:
        """Return the mask for a prompt. The cost does not depend on the objects of the image.

        Raises:
            UsageError: If the prompt is outside of the image.
            ImageError: If the image cannot be read.
        """
        embedding = self.embedding(index)
        with at_most(1 + embedding.tensors["image"].numel() // PER_THREAD):
            begin = time.perf_counter()
            choices = self.system.segment(embedding, self._prompts(index, prompt, embedding.image_size))
            networks = timed(begin)
            found = choices.best()
            assert found.masks is not None
            assert found.scores is not None
            counts = found.masks.rle()[0]["counts"].decode("ascii")
            score = float(found.scores[0])
        with self._lock:
            self._logits[index, counts] = choices.logits[:, 0]  # one answer for each prompt
            while len(self._logits) > REMEMBERED:
                self._logits.popitem(last=False)
        return Answer(counts, score if math.isfinite(score) else 0.0, (networks, round(timed(begin) - networks, 1)))

    def _prompts(self, index: int, prompt: Prompt, size: Size) -> Prompts:
        places = [[x, y] for x, y, _ in prompt.points]
        prompts = Prompts.from_points(size, [places], [[label for _, _, label in prompt.points]])
        if prompt.box is not None:
            prompts = replace(prompts, boxes=Prompts.from_boxes([list(prompt.box)], size).boxes)
        if prompt.counts is None or not self.system.reads_masks:
            return prompts
        with self._lock:
            logits = self._logits.get((index, prompt.counts))
        if logits is not None:
            return replace(prompts, logits=logits)
        return replace(prompts, masks=Masks("rle", [prompt.counts.encode("ascii")], size))


@contextmanager
def at_most(threads: int) -> Generator[None]:
    """Compute with so many threads, or with fewer if PyTorch is set to fewer.

    The operations of a small decoder are so short that a second thread gains little, and all of them wait whenever the
    core of that thread is taken by something else, such as the browser.
    """
    before = torch.get_num_threads()
    if threads >= before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def encoded(system: PromptableSystem, image: Tensor) -> Embedding:
    """Return the embedding of an image (3, H, W) uint8."""
    batch = system.preprocess.collate([system.preprocess.match_channels(image)])
    return system.embed(batch.images, batch.placements)[0]


def nbytes(embedding: Embedding) -> int:
    """Return the bytes of an embedding."""
    return sum(value.nbytes for value in embedding.tensors.values())


def read_prompt(message: dict[str, Any], size: Size) -> Prompt:
    """Check the prompt of a message.

    Args:
        message: What the page has sent.
        size: H, W of the image.

    Raises:
        UsageError: If it has another form, is empty or outside of the image.
    """
    points = _points(message.get("points"), size)
    box = _box(message.get("box"), size)
    rle = message.get("rle")
    counts = None if rle is None else read_any_mask(rle, size)
    if not points and box is None and counts is None:
        raise UsageError("a prompt must have points, a box or a mask")
    return Prompt(points, box, counts)


def _points(values: Any, size: Size) -> tuple[tuple[float, float, int], ...]:
    if values is None:
        return ()
    if not isinstance(values, list) or len(cast("list[Any]", values)) > MAX_POINTS:
        raise UsageError(f"points must be a list of at most {MAX_POINTS} points, got {shown(values)}")
    return tuple(_point(value, size) for value in cast("list[Any]", values))


def _point(value: Any, size: Size) -> tuple[float, float, int]:
    parts = cast("list[Any]", value) if isinstance(value, list) else []
    if len(parts) != 3 or not all(is_number(v) for v in parts) or parts[2] not in (0, 1):
        raise UsageError(f"a point must be [x, y, 1 or 0], got {shown(value)}")
    x, y = float(parts[0]), float(parts[1])
    height, width = size
    if not (-1 <= x <= width + 1 and -1 <= y <= height + 1):
        raise UsageError(f"the point {x:g}, {y:g} is outside of the image of {width} x {height} pixels")
    return min(max(x, 0.0), float(width)), min(max(y, 0.0), float(height)), int(parts[2])


def _box(value: Any, size: Size) -> tuple[float, float, float, float] | None:
    if value is None:
        return None
    parts = cast("list[Any]", value) if isinstance(value, list) else []
    if len(parts) != 4 or not all(is_number(v) for v in parts):
        raise UsageError(f"box must be [x0, y0, x1, y1], got {shown(value)}")
    (x0, x1), (y0, y1) = sorted((float(parts[0]), float(parts[2]))), sorted((float(parts[1]), float(parts[3])))
    height, width = size
    if x0 > width or y0 > height or x1 < 0 or y1 < 0:
        raise UsageError(f"the box is outside of the image of {width} x {height} pixels")
    return max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))


def timed(begin: float) -> float:
    """Return the milliseconds since a value of `time.perf_counter`."""
    return round(1000 * (time.perf_counter() - begin), 1)


def warm(assistant: Assistant) -> None:
    """Run the networks once on an empty image, so that the first click does not pay for it."""
    with torch.no_grad():
        system = assistant.system
        embedding = encoded(system, torch.zeros(3, 64, 64, dtype=torch.uint8))
        system.segment(embedding, Prompts.from_points((64, 64), cast(Sequence[Any], [[[32.0, 32.0]]]))).best()
