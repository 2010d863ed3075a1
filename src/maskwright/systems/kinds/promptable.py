"""Systems that segment what they are prompted for: points, boxes and masks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.prompting import ABSENT, FIRST_CORNER, LAST_CORNER, NOTHING, Decoded, MaskDecoder, draw_prompts
from maskwright.errors import UsageError
from maskwright.ops.planes import place_planes
from maskwright.options import OptionGroup
from maskwright.structures import Choices, Embedding, Instances, Masks, Placement, Preprocess, Prompts
from maskwright.systems.kinds import prompt_training
from maskwright.systems.kinds.everything import Grid, cleaned, find_in_crop
from maskwright.systems.kinds.prompt_training import Simulation
from maskwright.systems.kinds.proposals import ProposalSystem
from maskwright.systems.system import Output, Task

Answers = Literal[1, 3, 4]


@dataclass(frozen=True)
class Features:
    """What the image encoder gives for B images: the raw output of a promptable system.

    Attributes:
        image: The image embedding.
        finer: Finer feature maps, for decoders that use them; otherwise empty. In tracking, those of one frame are
            shared by several objects.
        size: Height and width of the network's input, padding included.
    """

    image: Float[Tensor, "b c h w"]
    finer: tuple[Float[Tensor, "_b _c _h _w"], ...] = ()
    size: tuple[int, int] = (0, 0)

    def of(self, index: int) -> Features:
        """The features of one image, with batch size 1."""
        part = slice(index, index + 1)
        return replace(self, image=self.image[part], finer=tuple(level[part] for level in self.finer))

    def __getitem__(self, owner: Int[Tensor, " n"]) -> Features:
        """The features of the image of each of n prompts."""
        return replace(self, image=self.image[owner], finer=tuple(level[owner] for level in self.finer))


@dataclass(frozen=True)
class Slots:
    """Prompts as the networks read them, see `blocks.prompting`.

    Attributes:
        points: x, y in units of the input's width and height.
        labels: What each slot holds.
        logits: Masks; None if no prompt has one.
        has_mask: Which prompts have a mask; None: all, if there are `logits`.
        ragged: Whether a slot is `ABSENT`.
    """

    points: Float[Tensor, "n t 2"]
    labels: Int[Tensor, "n t"]
    logits: Float[Tensor, "n 1 h w"] | None = None
    has_mask: Bool[Tensor, " n"] | None = None
    ragged: bool = False

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, rows: slice | Tensor) -> Slots:
        """Selects prompts."""
        logits, has_mask = (None if v is None else v[rows] for v in (self.logits, self.has_mask))
        return replace(self, points=self.points[rows], labels=self.labels[rows], logits=logits, has_mask=has_mask)

    def to(self, device: torch.device, dtype: torch.dtype) -> Slots:
        """Moves the prompts to a device; `dtype` is that of mask logits."""
        return replace(
            self,
            points=self.points.float().to(device),
            labels=self.labels.to(device),
            logits=None if self.logits is None else self.logits.to(device, dtype),
            has_mask=None if self.has_mask is None else self.has_mask.to(device),
        )

    @property
    def allowed(self) -> Bool[Tensor, "n t"] | None:
        """The slots that hold a prompt; None: all."""
        return self.labels != ABSENT if self.ragged else None

    def complete(self, grid: tuple[int, int] | None) -> Slots:
        """The same prompts with every optional tensor given.

        Args:
            grid: Height and width of mask logits; None: for networks that do not read masks.
        """
        if grid is None:
            return replace(self, ragged=True)
        count, like = self.points.shape[0], self.points
        logits = like.new_zeros(count, 1, *grid) if self.logits is None else self.logits
        given = torch.full((count,), self.logits is not None, device=like.device)
        return replace(self, logits=logits, has_mask=given if self.has_mask is None else self.has_mask, ragged=True)


@dataclass(frozen=True)
class PromptDecoder(OptionGroup):
    """Prompt encoder and mask decoder, as options of a system.

    Attributes:
        width: Channels of tokens and of the image embedding.
        depth: Layers of the transformer.
        heads: Attention heads.
        hidden: Channels inside of the transformer's MLP.
        answers: Masks of each prompt: one for prompts without ambiguity, then those for ambiguous ones.
        score_hidden: Channels inside of the network that predicts the IoU.
        score_layers: Its linear layers.
        refine: Layers of convolutions that read points and boxes as masks at a quarter of the input's resolution (not
            published), for systems that draw them; 0: none.
    """

    label: ClassVar[str] = "decoder"

    width: int = 256
    depth: int = 2
    heads: int = 8
    hidden: int = 2048
    answers: int = 4
    score_hidden: int = 256
    score_layers: int = 3
    refine: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(1, "depth", "heads", "hidden", "score_hidden", "score_layers")
        self.check_at_least(2, "answers")
        if self.width % 8 or self.width % (2 * self.heads):
            raise UsageError(
                f"decoder.width must be a multiple of 8 and of 2 * decoder.heads = {2 * self.heads}, got {self.width}"
            )

    @property
    def upscaled(self) -> tuple[int, int]:
        """Channels of the finer maps that are added while upscaling, at 1/4 and 1/8 of the resolution."""
        return self.width // 8, self.width // 4

    def build(self, **options: Any) -> MaskDecoder:
        """Constructs the mask decoder; for `options` see there."""
        own = {name: getattr(self, name) for name in ("answers", "score_hidden", "score_layers", "refine")}
        return MaskDecoder(self.width, self.depth, self.heads, self.hidden, **own, **options)


class PromptableSystem(ProposalSystem):
    """A system that encodes an image once (`embed`) and then answers prompts fast (`segment`).

    Both keep no state: one embedding serves any number of threads. Objects have no class. `decode` prompts with a grid
    of points and keeps what is good ("segment everything"), so that prediction and evaluation work as for any system.

    A subclass has the direct submodules `image_encoder` (images to the image embedding, or to a tuple of it and finer
    maps), `prompt_encoder` and `mask_decoder` with the interfaces of `blocks.prompting`, and may override `padding` and
    `single`.

    Attributes:
        steps: How mask logits reach the image: 2, resized to the network's input and from there (SAM); 1, at once.
        cubic: Whether they are resized by cubic interpolation, with 1 step.
        points_per_side: Default of `decode`.
        most_padding: The largest number that `padding` returns.
        reads_masks: Whether masks can be prompts.
        draws: Whether points and boxes are drawn as masks too, see `blocks.prompting.draw_prompts`.
        uniform: Whether networks are called with every optional input, so that all calls are of one form, as exported
            networks need them.
        simulation: How prompts are simulated in training.
    """

    image_encoder: nn.Module
    prompt_encoder: nn.Module
    mask_decoder: nn.Module
    steps: ClassVar[Literal[1, 2]] = 2
    cubic: ClassVar[bool] = False
    points_per_side: int = 32
    most_padding: ClassVar[int] = 1
    reads_masks: ClassVar[bool] = True
    draws: bool = False
    uniform: bool = False
    simulation: Simulation

    @property
    def tasks(self) -> frozenset[Task]:
        return frozenset({"instances", "proposals", "prompts"})

    # ---- construction ------------------------------------------------------------------------------------------------

    def checked_canvas(self, preprocess: Preprocess, stride: int) -> Preprocess:
        """`preprocess`, whose canvas must be a multiple of `stride` pixels."""
        canvas = preprocess.canvas
        if canvas is None or min(canvas) < stride or canvas[0] % stride or canvas[1] % stride:
            given = None if canvas is None else list(canvas)
            raise UsageError(f"{self.name}: resize.canvas must be a multiple of {stride}, got {given}")
        return preprocess

    def checked_points(self, points_per_side: int) -> int:
        """`points_per_side`, which must be at least 1."""
        if points_per_side < 1:
            raise UsageError(f"{self.name}: points_per_side must be at least 1, got {points_per_side}")
        return points_per_side

    # ---- the slow half -----------------------------------------------------------------------------------------------

    def forward(self, images: Float[Tensor, "b c h w"]) -> Features:
        """Encodes images."""
        found: Tensor | tuple[Tensor, ...] = self.image_encoder(images)
        image, *finer = (found,) if isinstance(found, Tensor) else found
        return Features(image, tuple(finer), (images.shape[-2], images.shape[-1]))

    @torch.no_grad()
    def embed(self, images: Float[Tensor, "b c h w"], placements: Sequence[Placement]) -> list[Embedding]:
        """Encodes images, once for any number of prompts.

        Args:
            images: Preprocessed images, as in `Batch.images`.
            placements: How each image was placed in the input.

        Returns:
            The embedding of each image.

        Raises:
            UsageError: If `images` is no batch of preprocessed images, or there is not a placement for each image that
                fits into the input.
        """
        if images.ndim != 4 or len(images) != len(placements):
            raise UsageError(
                f"images must be a batch (B, C, H, W) with a placement for each, got shape {tuple(images.shape)} and "
                f"{len(placements)} placements"
            )
        if not images.is_floating_point():
            raise UsageError(
                f"images must be preprocessed, in floating point, got {images.dtype}; see system.preprocess.collate"
            )
        height, width = images.shape[-2:]
        for number, placement in enumerate(placements):
            rows, columns = placement.size
            if rows > height or columns > width:
                raise UsageError(
                    f"placement {number} puts the image on {rows} x {columns} pixels, but the input has {height} x "
                    f"{width}; give the placements that `preprocess` returned with the images"
                )
        return self.embeddings(self(images.to(*_place_of(self.image_encoder))), placements)

    def embeddings(self, features: Features, placements: Sequence[Placement]) -> list[Embedding]:
        """The embedding of each image of a batch, from the raw output."""
        name, found = self.fingerprint, list[Embedding]()
        for index, placement in enumerate(placements):
            tensors = {"image": features.image[index]}
            tensors |= {f"finer.{number}": level[index] for number, level in enumerate(features.finer)}
            found.append(Embedding(tensors, placement, features.size, name))
        return found

    def features(self, embedding: Embedding) -> Features:
        """The features in an embedding, with batch size 1, on the device of the decoder and in its type.

        Raises:
            UsageError: If the embedding is of another system or of other weights.
        """
        if embedding.system != self.fingerprint:
            raise UsageError(
                f"the embedding was computed by {embedding.system}, but this system is {self.fingerprint}; embed the "
                "image with this system"
            )
        place = _place_of(self.mask_decoder)
        tensors = {name: value[None].to(*place) for name, value in embedding.tensors.items()}
        finer = tuple(tensors[f"finer.{number}"] for number in range(len(tensors) - 1))
        return Features(tensors["image"], finer, embedding.input_size)

    @property
    def fingerprint(self) -> str:
        """Identifies the system and the weights of its image encoder: `NAME-` and 16 digits.

        A copy made by `prepare` (another precision, folded norms) has that of the original. Values are sampled from
        every tensor, so that it takes little time; it is computed again when weights change.
        """
        kept = self.__dict__.get("_pinned")
        if kept is not None:
            return kept
        tensors = [*self.image_encoder.parameters(), *self.image_encoder.buffers()]
        state = tuple((id(t), t._version) for t in tensors)  # pyright: ignore[reportPrivateUsage] - no public counter
        cached = self.__dict__.get("_fingerprint")
        if cached is None or cached[0] != state:
            samples = [t.detach().flatten()[:: max(1, t.numel() // 16)][:16].double() for t in tensors]
            about = json.dumps({k: v for k, v in self.options.items() if k != "classes"}, sort_keys=True)
            digest = hashlib.sha256(about.encode() + torch.cat(samples).cpu().numpy().tobytes())
            cached = state, f"{self.name}-{digest.hexdigest()[:16]}"
            self.__dict__["_fingerprint"] = cached
        return cached[1]

    def pin_fingerprint(self, name: str) -> None:
        """Keeps a fingerprint whatever the weights become; for copies that compute the same in another form."""
        self.__dict__["_pinned"] = name

    # ---- the fast half -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def segment(
        self, embedding: Embedding, prompts: Prompts, *, answers: Answers | None = None, budget: int = 1 << 30
    ) -> Choices:
        """Answers prompts.

        Objects may have different kinds and numbers of prompts; each gets the same answer as alone.

        Args:
            embedding: The encoded image.
            prompts: What to segment.
            answers: Masks for each prompt: 1 is the mask for prompts without ambiguity, 3 are whole, part and sub-part
                for ambiguous ones, 4 are both, in this order. None: one, the best of the three by predicted IoU for a
                single point, otherwise the first.
            budget: Bytes of scratch memory; it limits how many prompts are decoded at a time.

        Raises:
            UsageError: If the embedding is of another system or image, mask logits have the wrong size, a prompt is of
                a kind that the system does not read, or an argument is invalid.
        """
        for value, kind in ((embedding, Embedding), (prompts, Prompts)):
            if not isinstance(value, kind):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may not be checked
                raise UsageError(f"segment needs an Embedding and Prompts, got {type(value).__name__}")
        if answers not in (None, 1, 3, 4):
            raise UsageError(f"answers must be 1, 3, 4 or None, got {answers!r}")
        if not isinstance(budget, int) or budget < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"budget must be a number of bytes, an integer of at least 1, got {budget!r}")
        if any(prompts.text or ()):
            raise UsageError(f"{self.name} does not read text; use points, boxes or masks")
        if prompts.image_size != tuple(embedding.image_size):
            raise UsageError(
                f"the prompts are for an image of {prompts.image_size}, the embedding is of one of "
                f"{tuple(embedding.image_size)}"
            )
        features = self.features(embedding)
        slots = self.slots(prompts, embedding.placement, features)
        ambiguous = self.ambiguous(prompts).to(features.image.device)
        step = self.prompts_at_once(features, budget)
        parts = [
            self.choose(self.answer(features, slots[rows]), ambiguous[rows], answers)
            for first in range(0, max(1, len(slots)), step)
            for rows in (slice(first, first + step),)
        ]
        return self.choices(parts, embedding)

    def choices(self, parts: Sequence[Decoded], embedding: Embedding) -> Choices:
        """Joins decoded prompts of one image to `Choices`."""
        logits, scores, tokens = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("logits", "scores", "tokens")
        )
        present = [part.present for part in parts if part.present is not None]
        return Choices(
            embedding.image_size,
            logits.float(),
            scores.float(),
            partial(self.place, placement=embedding.placement, size=embedding.input_size),
            torch.cat(present).float() if present else None,
            tokens,
        )

    def place(self, logits: Float[Tensor, "k h w"], placement: Placement, size: tuple[int, int]) -> Masks:
        """Resizes mask logits to masks of the image.

        Args:
            logits: Mask logits on the low-resolution grid.
            placement: How the image was placed in the input.
            size: Height and width of the network's input.
        """
        return place_planes(logits, placement, size, threshold=0.0, steps=self.steps, cubic=self.cubic)

    def answer(self, features: Features, slots: Slots) -> Decoded:
        """Runs prompt encoder and mask decoder.

        Args:
            features: Of one image (batch size 1), or of the image of each prompt.
            slots: The prompts.
        """
        like = features.image
        slots = slots.to(like.device, like.dtype)
        if self.draws:
            grid = (4 * like.shape[-2], 4 * like.shape[-1])
            drawn = draw_prompts(slots.points, slots.labels, grid, slots.logits, slots.has_mask)
            everyone = torch.ones(slots.points.shape[0], dtype=torch.bool, device=like.device)
            slots = replace(slots, logits=drawn.to(like.dtype), has_mask=everyone)
        if self.uniform:
            slots = slots.complete((4 * like.shape[-2], 4 * like.shape[-1]) if self.reads_masks else None)
        prompts = self.prompt_encoder(slots.points, slots.labels, tuple(like.shape[-2:]), slots.logits, slots.has_mask)
        return self.mask_decoder(like, prompts, slots.allowed, features.finer)

    def choose(self, decoded: Decoded, ambiguous: Bool[Tensor, " n"], answers: Answers | None) -> Decoded:
        """Selects among the answers to each prompt; see `segment`."""
        if answers == 4:
            return decoded
        if answers == 3:
            index = torch.arange(1, decoded.scores.shape[1], device=decoded.scores.device).expand(len(ambiguous), -1)
        else:
            index = self.single(decoded)
            if answers is None and decoded.scores.shape[1] > 1:
                index = torch.where(ambiguous, 1 + decoded.scores[:, 1:].argmax(1), index)
            index = index[:, None]
        rows = torch.arange(len(index), device=index.device)[:, None]
        logits, scores, tokens = (v[rows, index] for v in (decoded.logits, decoded.scores, decoded.tokens))
        return Decoded(logits, scores, tokens, decoded.present)

    def single(self, decoded: Decoded) -> Int[Tensor, " n"]:
        """The answer for each prompt without ambiguity: the first."""
        return torch.zeros(len(decoded.scores), dtype=torch.int64, device=decoded.scores.device)

    def ambiguous(self, prompts: Prompts) -> Bool[Tensor, " n"]:
        """The prompts that may mean several objects: at most one point, and neither box nor mask."""
        return (prompts.point_counts <= 1) & ~prompts.has_box & ~prompts.has_mask

    # ---- prompts as tensors ------------------------------------------------------------------------------------------

    def slots(self, prompts: Prompts, placement: Placement, features: Features) -> Slots:
        """Converts prompts of an image to what the networks read.

        Coordinates are mapped to the input and moved by 0.5 pixels, points and corners of boxes alike, as in the
        original code, which regards them as the index of a pixel and encodes its centre.

        Args:
            prompts: Prompts on the image's own grid.
            placement: How the image was placed in the input.
            features: The features of the image, for the sizes of input and embedding.
        """
        unit = prompts.points.new_tensor([features.size[1], features.size[0]])
        boxed, ignored = prompts.has_box, prompts.ignored
        points = (placement.points_to_input(prompts.points.nan_to_num()) + 0.5) / unit
        labels = torch.where(ignored, ABSENT, prompts.point_labels)
        fill = self.padding((~ignored).sum(1), boxed)  # (n,)
        most = int(fill.max()) if len(fill) else 0
        beside = (points.new_full((len(points), most, 2), -1.0) + 0.5) / unit  # as EfficientSAM places them
        kinds = torch.where(torch.arange(most) < fill[:, None], NOTHING, ABSENT)
        parts = [(points, labels), (beside, kinds)]
        if prompts.boxes is not None:
            corners = placement.boxes_to_input(prompts.boxes).reshape(-1, 2, 2)
            corners = (corners + 0.5) / unit.to(corners)
            kinds = torch.tensor([FIRST_CORNER, LAST_CORNER]).expand(len(corners), -1)
            parts.append((corners.nan_to_num().to(points), torch.where(boxed[:, None], kinds, ABSENT)))
        points, labels = torch.cat([p for p, _ in parts], 1), torch.cat([v for _, v in parts], 1)
        used = (labels != ABSENT).any(0)
        points, labels = points[:, used], labels[:, used]
        logits, has_mask = self.mask_logits(prompts, placement, features)
        return Slots(points, labels, logits, has_mask, bool((labels == ABSENT).any()))

    def padding(self, counts: Int[Tensor, " n"], boxed: Bool[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The number of "not a point" tokens of each prompt: one if there are points but no box.

        Args:
            counts: Points of each prompt.
            boxed: Which prompts have a box.
        """
        return ((counts > 0) & ~boxed).long()

    def mask_logits(
        self, prompts: Prompts, placement: Placement, features: Features
    ) -> tuple[Float[Tensor, "n 1 h w"] | None, Bool[Tensor, " n"] | None]:
        """The mask prompts on the grid that the prompt encoder reads, and which prompts have one (None: all).

        Logits of earlier answers are taken as they are. A mask of the image becomes 20 p - 10, where p is the share of
        a cell that it covers (as SAM 2 scales masks).
        """
        given = prompts.has_mask
        if not bool(given.any()):
            return None, None
        if not self.reads_masks:
            raise UsageError(f"{self.name} does not read masks as prompts; use points and boxes")
        grid = (4 * features.image.shape[-2], 4 * features.image.shape[-1])
        logits = prompts.logits
        if logits is not None and tuple(logits.shape[1:]) != grid:
            raise UsageError(f"mask logits must be {grid[0]} x {grid[1]}, got {logits.shape[1]} x {logits.shape[2]}")
        if prompts.masks is not None:
            drawn = _shares(prompts.masks, placement, features.size, grid) * 20 - 10
            if logits is None:
                logits = drawn
            else:
                logits = torch.where(logits[:, :1, :1].isnan(), drawn.to(logits), logits)
        assert logits is not None
        return logits[:, None].nan_to_num(), None if bool(given.all()) else given

    @staticmethod
    def prompts_at_once(features: Features, budget: int) -> int:
        """How many prompts can be decoded at a time with so many bytes of scratch memory.

        Processors read small maps faster: for 64 prompts of SAM 2, 256 MiB take three quarters of the time of 1 GiB.
        """
        _, width, height, columns = features.image.shape
        if features.image.device.type == "cpu":
            budget = min(budget, 1 << 28)
        return max(1, budget // (14 * height * columns * width * 4))  # measured: 13 maps in float32 at the peak

    # ---- training ----------------------------------------------------------------------------------------------------

    @property
    def needs(self) -> frozenset[Output]:
        return frozenset({"masks"})

    def groups(self) -> dict[str, list[nn.Module]]:
        return {
            "backbone": [self.image_encoder],
            "prompt_encoder": [self.prompt_encoder],
            "mask_decoder": [self.mask_decoder],
        }

    def losses(self, raw: Features, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Simulates prompts for the objects and computes the losses of the answers (appendix A); see
        `kinds.prompt_training`.

        Args:
            raw: What `forward` returned.
            targets: Objects of each image, in the frame of the network's input. Labels do not count.

        Returns:
            `mask`, `dice` and `iou`, weighted. Prompts are drawn by torch's generator.
        """
        return prompt_training.losses(self, raw, targets, self.simulation)

    # ---- everything --------------------------------------------------------------------------------------------------

    def decode(
        self,
        raw: Features,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.88,
        nms_threshold: float = 0.7,
        detections: int | None = None,
        points_per_side: int | None = None,
        points_per_batch: int = 64,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        min_mask_region_area: int = 0,
        use_m2m: bool = False,
    ) -> list[Instances]:
        """Segments everything: prompts with a grid of points, and keeps good and stable masks (section 5).

        Args:
            raw: What `forward` returned.
            placements: How each image was placed in the input.
            score_threshold: Masks are kept whose predicted IoU is greater; 0 keeps all.
            nms_threshold: Box IoU above which the mask with the lower score is dropped.
            detections: Limit of objects per image; None: all.
            points_per_side: The grid has the square of this many points; None: the system's (32 as published).
            points_per_batch: Points that are decoded at a time.
            stability_score_thresh: Masks of less stability are dropped: the ratio of the areas at a threshold of logits
                of `stability_score_offset` and of minus that. 0 keeps all.
            stability_score_offset: See above.
            crop_n_layers: Layer i = 1 ... consists of 2^i x 2^i overlapping crops of the image, each encoded and
                segmented as an image of its own. Only `predict` does this, because it needs the image itself.
            crop_nms_thresh: As `nms_threshold`, between crops, where smaller crops take precedence.
            crop_overlap_ratio: Overlap of the crops of layer 1, as a share of the short side; half of it in each
                further layer.
            crop_n_points_downscale_factor: The points per side are divided by this in each further layer.
            min_mask_region_area: Holes and parts of fewer pixels are filled and dropped; 0 keeps masks as they are.
            use_m2m: Refine each mask once, with its own logits as a prompt, before masks are filtered (SAM 2).

        Returns:
            Objects of label 0, best first.
        """
        if crop_n_layers:
            raise UsageError("crop_n_layers needs the image itself, which only predict has; evaluate without it")
        options = self.everything_options(
            score_threshold=score_threshold, nms_threshold=nms_threshold, points_per_side=points_per_side,
            points_per_batch=points_per_batch, stability_score_thresh=stability_score_thresh,
            stability_score_offset=stability_score_offset, crop_nms_thresh=crop_nms_thresh,
            crop_overlap_ratio=crop_overlap_ratio, crop_n_points_downscale_factor=crop_n_points_downscale_factor,
            min_mask_region_area=min_mask_region_area, use_m2m=use_m2m,
        )  # fmt: skip
        return self.everything(raw, placements, options, detections)

    def everything(
        self, raw: Features, placements: Sequence[Placement], options: Grid, detections: int | None
    ) -> list[Instances]:
        """`decode` with its options as one value."""
        found = [find_in_crop(self, raw.of(index), place, options) for index, place in enumerate(placements)]
        return [cleaned(own, options).instances(detections) for own in found]

    def everything_options(self, **options: Any) -> Grid:
        """Options of `decode` as one value, checked; those that are None or absent have the system's default."""
        given: dict[str, Any] = {"points_per_side": self.points_per_side}
        return Grid(**(given | {name: value for name, value in options.items() if value is not None}))

    def answers_to_points(
        self, features: Features, placement: Placement, points: Float[Tensor, "n 2"], options: Grid
    ) -> tuple[Float[Tensor, "k h w"], Float[Tensor, " k"], Int[Tensor, " k"]]:
        """The answers to each of n points.

        Args:
            features: The features of an image, with batch size 1.
            placement: How the image was placed in the input.
            points: x, y on the image.
            options: Whether to refine each answer with its own logits as a prompt.

        Returns:
            Mask logits, predicted IoUs, and the number of the point of each answer.
        """
        return self.answers(features, placement, points, 3, refine=options.use_m2m)

    def answers(
        self, features: Features, placement: Placement, points: Tensor, count: Answers, *, refine: bool
    ) -> tuple[Float[Tensor, "k h w"], Float[Tensor, " k"], Int[Tensor, " k"]]:
        """`answers_to_points` with `count` answers to each point."""
        labels = torch.ones(len(points), 1, dtype=torch.int64)
        prompts = Prompts(placement.image_size, points[:, None], labels)
        slots, ambiguous = self.slots(prompts, placement, features), self.ambiguous(prompts)
        decoded = self.choose(self.answer(features, slots), ambiguous, count)
        owner = torch.arange(len(points), device=decoded.scores.device)
        owner = owner.repeat_interleave(decoded.scores.shape[1])
        logits, scores = decoded.logits.flatten(0, 1), decoded.scores.flatten()
        if refine:
            again = prompts[owner.cpu()]
            step = max(1, len(points))
            refined = list[Decoded]()
            for part in (slice(first, first + step) for first in range(0, len(again), step)):
                own = replace(again[part], logits=self.feedback(logits[part]))
                slots = self.slots(own, placement, features)
                refined.append(self.choose(self.answer(features, slots), self.ambiguous(own), 1))
            logits = torch.cat([part.logits[:, 0] for part in refined])
            scores = torch.cat([part.scores[:, 0] for part in refined])
        return logits.float(), scores.float(), owner

    def feedback(self, logits: Float[Tensor, "n h w"]) -> Float[Tensor, "n h w"]:
        """Mask logits of an answer in the form in which they are a prompt: as they are."""
        return logits.float()


def _place_of(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and type of the tensors that a network takes."""
    parameter = next(network.parameters())
    # Networks that a runtime computes have parameters without memory.
    return (torch.device("cpu"), torch.float32) if parameter.is_meta else (parameter.device, parameter.dtype)


def _shares(masks: Masks, placement: Placement, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(n, h, w): the share of each cell of a grid over the input that each mask covers."""
    placed, parts = masks.place(placement), list[Tensor]()
    for first in range(0, len(placed), 16):
        planes = placed[first : first + 16].dense().float()
        planes = functional.pad(planes, (0, size[1] - planes.shape[2], 0, size[0] - planes.shape[1]))
        parts.append(functional.adaptive_avg_pool2d(planes[:, None], grid)[:, 0])
    return torch.cat(parts) if parts else torch.zeros(0, *grid)
