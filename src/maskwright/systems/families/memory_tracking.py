"""Tracking with a bank of memories, as in SAM 2 (arXiv 2408.00714, section 4).

The features of a frame attend to memories of the object in other frames and to object pointers; then the mask decoder
answers. The rules of the official predictor are followed: which frames are read (`kinds.video.MemoryBank`), which of
several masks is taken, and what is remembered of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.prompting import NOTHING, Decoded, stable_answer
from maskwright.errors import UsageError
from maskwright.ops.components import small_components
from maskwright.structures import Choices, Embedding, Masks, Placement, Preprocess, Prompts
from maskwright.systems.kinds.promptable import Features, Slots
from maskwright.systems.kinds.video import Attended, Memory, MemoryBank, Remembered, Track, VideoSystem

T = TypeVar("T")

ABSENT_LOGIT = -1024.0  # of every cell of the mask of an object that is not in the frame
GIVEN_LOGIT = 10.0  # of a mask that is a prompt
EARLIER_LOGIT = 32.0  # bound of the logits of an earlier answer that is a prompt


@dataclass(frozen=True)
class FrameFeatures(Features):
    """The features of B images.

    Attributes:
        image: Features of stride 16 of images, or of frames that attend to no other.
        finer: Features of stride 4 and 8.
        frame: Features of stride 16, which attend to memories and from which memories are made.
    """

    frame: Float[Tensor, "_b c h w"] | None = None

    def of(self, index: int) -> FrameFeatures:
        """The features of one image, with batch size 1."""
        return self[torch.tensor([index])]

    def __getitem__(self, owner: Int[Tensor, " n"]) -> FrameFeatures:
        """The features of the image of each of n prompts."""
        frame = None if self.frame is None else self.frame[owner]
        return replace(self, image=self.image[owner], finer=tuple(level[owner] for level in self.finer), frame=frame)


class MemoryTracker(VideoSystem):
    """A system that tracks objects with a bank of memories.

    A subclass has, besides those of a promptable system, the direct submodules `pointer` (output token and presence to
    object pointer), `memory_attention` and `memory_encoder` with the interfaces of `blocks.memory_attention`, and
    `mask_prompt` (a mask of the input to logits of the low-resolution grid). Its image encoder returns four maps: that
    of an image by itself, two finer ones, and that which attends to memories.

    Attributes:
        bank: What a frame attends to.
        width: Channels of features and pointers.
    """

    steps = 1
    bank: MemoryBank
    width: int
    pointer: nn.Module
    memory_attention: nn.Module
    memory_encoder: nn.Module
    mask_prompt: nn.Module

    @property
    def frame_preprocess(self) -> Preprocess:
        return replace(self.preprocess, resample="bicubic")

    def forward(self, images: Float[Tensor, "b c h w"]) -> FrameFeatures:
        """Encodes images."""
        image, fine, middle, frame = self.image_encoder(images)
        return FrameFeatures(image, (fine, middle), (images.shape[-2], images.shape[-1]), frame)

    def embeddings(self, features: Features, placements: Sequence[Placement]) -> list[Embedding]:
        found, frame = super().embeddings(features, placements), cast(FrameFeatures, features).frame
        if frame is None:
            return found
        return [replace(e, tensors={**e.tensors, "frame": frame[n]}) for n, e in enumerate(found)]

    def features(self, embedding: Embedding) -> FrameFeatures:
        tensors = {name: value for name, value in embedding.tensors.items() if name != "frame"}
        found = super().features(replace(embedding, tensors=tensors))
        frame = embedding.tensors.get("frame")
        frame = None if frame is None else frame[None].to(found.image)
        return FrameFeatures(found.image, found.finer, found.size, frame)

    @torch.no_grad()
    def track(
        self,
        frame: Embedding,
        memory: Memory,
        prompts: Prompts | None = None,
        *,
        index: int | None = None,
        reverse: bool = False,
        hidden: Sequence[int] = (),
        budget: int = 1 << 30,
        **options: Any,
    ) -> tuple[Choices, Memory]:
        """Segments objects in a frame, see `VideoSystem.track`.

        An object that is not in the frame has a negative logit in `Choices.present` and an empty mask. A prompt on a
        frame in which the object was not tracked yet is answered from the frame alone; otherwise it corrects the
        answer, with the memory of other frames and the mask before.

        Args:
            frame: The frame, with its features ("frame"), as `embed` returns it.
            memory: The memory.
            prompts: Prompts of objects.
            index: Number of the frame.
            reverse: Whether the frames are given backwards. It does not matter for objects with prompts.
            hidden: Rows of objects that are stated not to be in the frame; their prompts are ignored.
            budget: Bytes of scratch memory; it limits how many objects are computed at a time.

        Raises:
            UsageError: If the embedding or the prompts do not fit.
        """
        if index is None:
            index = 0 if memory.frame is None else memory.frame + (-1 if reverse else 1)
        features = self.features(frame)
        if features.frame is None:
            raise UsageError("the embedding has no features for videos; compute it with `embed` of this system")
        if prompts is not None and prompts.image_size != tuple(frame.image_size):
            raise UsageError(
                f"the prompts are for an image of {prompts.image_size}, the frame is one of {tuple(frame.image_size)}"
            )
        count = max([len(memory), len(prompts or ()), *(row + 1 for row in hidden)])
        tracks = [*memory.tracks, *[Track()] * (count - len(memory))]
        asked = self._asked(prompts, hidden)
        work = _Frame(self, features, frame.placement, index, reverse, memory, budget)
        answers = dict[int, Remembered]()
        if asked:
            assert prompts is not None or not set(asked) - set(hidden)
            for row, answer in work.prompted(asked, tracks, prompts, hidden).items():
                before = tracks[row]
                conditions = before.passes.direction(index) is None or memory.corrections == "keep"
                tracks[row] = replace(before, new={**before.new, index: (answer, conditions)})
                answers[row] = answer
        others = [row for row in range(count) if row not in asked]
        work.commit(others, tracks)
        for row, answer in work.tracked(others, tracks).items():
            answers[row] = answer
            if index not in tracks[row].prompted:
                tracks[row] = replace(tracks[row], tracked={**tracks[row].tracked, index: answer})
        keep = None if memory.history is None else max(self.bank.window, memory.history)
        for row in others:
            track = tracks[row]
            near = {f: e for f, e in track.tracked.items() if keep is None or abs(f - index) <= keep}
            tracks[row] = replace(track, tracked=near, passes=track.passes.add(index, reverse))
        rows = [answers.get(row) for row in range(count)]
        return self._choices(rows, frame, features), replace(memory, tracks=tuple(tracks), frame=index)

    @staticmethod
    def _asked(prompts: Prompts | None, hidden: Sequence[int]) -> list[int]:
        """The rows with prompts."""
        if prompts is None:
            return sorted(hidden)
        given = (prompts.point_counts > 0) | prompts.has_box | prompts.has_mask
        return sorted({*hidden, *(row for row in range(len(prompts)) if given[row])})

    def _choices(self, rows: Sequence[Remembered | None], frame: Embedding, features: FrameFeatures) -> Choices:
        """One answer for each object; that it is absent for objects without prompts."""
        like = features.image
        size = (4 * like.shape[-2], 4 * like.shape[-1])
        empty = torch.full(size, ABSENT_LOGIT, device=like.device)
        nothing = empty.new_tensor(-EARLIER_LOGIT)
        logits = [empty if row is None else row.logits for row in rows]
        present = [nothing if row is None else row.present for row in rows]
        scores = [torch.zeros_like(nothing) if row is None else row.score for row in rows]
        stacked = [
            torch.stack(v) if v else like.new_zeros(0, *e) for v, e in ((logits, size), (present, ()), (scores, ()))
        ]
        decoded = Decoded(stacked[0][:, None], stacked[2][:, None], like.new_zeros(len(rows), 1, 0), stacked[1])
        return self.choices([decoded], frame)


class _Frame:
    """The computation of one frame for several objects."""

    def __init__(
        self,
        system: MemoryTracker,
        features: FrameFeatures,
        placement: Placement,
        index: int,
        reverse: bool,
        memory: Memory,
        budget: int,
    ):
        self.system, self.features, self.placement = system, features, placement
        self.index, self.reverse, self.memory, self.budget = index, reverse, memory, budget

    # ---- prompts -----------------------------------------------------------------------------------------------------

    def prompted(
        self, rows: Sequence[int], tracks: Sequence[Track], prompts: Prompts | None, hidden: Sequence[int]
    ) -> dict[int, Remembered]:
        """The answers to prompts: objects that attend to the same frames are computed together."""
        answers = dict[int, Remembered]()
        masks, groups = list(hidden), dict[Attended | None, list[int]]()
        for row in rows:
            if row in hidden:
                continue
            assert prompts is not None
            points = bool(prompts.point_counts[row] > 0) or bool(prompts.has_box[row])
            earlier = prompts.logits is not None and not bool(prompts.logits[row, 0, 0].isnan())
            if points or earlier:
                way = tracks[row].passes.direction(self.index)  # a correction looks back as the tracking did
                groups.setdefault(None if way is None else self.attended(tracks[row], way), []).append(row)
            else:
                masks.append(row)
        for part in _parts(sorted(masks), self.at_once(None)):
            given = None if prompts is None else prompts.masks
            answers |= dict(zip(part, self.given(self.planes(part, given, hidden)), strict=True))
        for attended, group in groups.items():
            assert prompts is not None
            for part in _parts(group, self.at_once(attended)):
                own = self.with_earlier(part, tracks, prompts[torch.tensor(part)])
                image = self.features.image if attended is None else self.conditioned(part, tracks, attended)
                slots = self.system.slots(own, self.placement, self.features)
                points = own.point_counts + 2 * own.has_box
                answers |= dict(zip(part, self.answered(image, slots, points <= 1)[0], strict=True))
        return answers

    def with_earlier(self, rows: Sequence[int], tracks: Sequence[Track], prompts: Prompts) -> Prompts:
        """Adds what is known of the mask in this frame to prompts without one."""
        height, width = (4 * side for side in self.features.image.shape[-2:])
        logits = prompts.logits
        logits = torch.full((len(rows), height, width), torch.nan) if logits is None else logits.clone()
        for number, row in enumerate(rows):
            known = tracks[row].known(self.index)
            if known is not None and not bool(prompts.has_mask[number]):
                logits = logits.to(known.logits.device)
                logits[number] = known.logits.clamp(-EARLIER_LOGIT, EARLIER_LOGIT)
        return prompts if bool(logits.isnan().all()) else replace(prompts, logits=logits)

    def planes(self, rows: Sequence[int], masks: Masks | None, hidden: Sequence[int]) -> Float[Tensor, "n 1 h w"]:
        """Masks of the image as planes of the input, 0 or 1."""
        size, like = self.features.size, self.features.image
        planes = list[Tensor]()
        for row in rows:
            if row in hidden:
                planes.append(like.new_zeros(1, *size))
                continue
            assert masks is not None
            own = masks[row : row + 1]
            if self.placement == Placement.resize(self.placement.image_size, size):
                plane = own.dense(like.device)[None].float()
                if own.size != size:
                    plane = functional.interpolate(plane, size=size, mode="bilinear", antialias=True)
                planes.append((plane[0] >= 0.5).to(like.dtype))
            else:
                plane = own.place(self.placement).dense(like.device).to(like.dtype)
                planes.append(functional.pad(plane, (0, size[1] - plane.shape[2], 0, size[0] - plane.shape[1])))
        return torch.stack(planes)

    def given(self, planes: Float[Tensor, "n 1 h w"]) -> list[Remembered]:
        """What is remembered of given masks: they are the answer, and the decoder only makes the object pointers."""
        system, features = self.system, self.features
        visible = planes.flatten(1).any(1)
        wide = (planes * 2 - 1).float() * GIVEN_LOGIT
        small = functional.interpolate(wide, scale_factor=0.25, mode="bilinear", antialias=True)
        slots = self.nothing(len(planes), system.mask_prompt(planes))
        assert features.frame is not None
        decoded = system.answer(replace(features, image=features.frame), slots)
        assert decoded.present is not None
        shown = (decoded.present > 0) & visible
        pointers = system.pointer(decoded.tokens[:, 0], shown.to(planes.dtype)[:, None])
        present = torch.where(visible, GIVEN_LOGIT, -GIVEN_LOGIT)
        return self.entries(small[:, 0], present, torch.ones_like(present), pointers)

    def nothing(self, count: int, logits: Tensor | None = None) -> Slots:
        """The prompts of objects without prompts: two slots without a point."""
        device = self.features.image.device
        labels = torch.full((count, 2), NOTHING, device=device)
        return Slots(torch.zeros(count, 2, 2, device=device), labels, logits)

    # ---- decoding ----------------------------------------------------------------------------------------------------

    def answered(
        self, image: Tensor, slots: Slots, ambiguous: Tensor
    ) -> tuple[list[Remembered], Float[Tensor, "n 1 h w"], Tensor]:
        """Decodes masks and chooses one for each object.

        Returns:
            What is remembered, and the mask logits and the logits of presence before holes are filled.
        """
        decoded = self.system.answer(replace(self.features, image=image), slots)
        assert decoded.present is not None
        best, ambiguous = 1 + decoded.scores[:, 1:].argmax(1), ambiguous.to(decoded.scores.device)
        chosen = torch.where(ambiguous, best, stable_answer(decoded))
        # For a replaced unstable mask the token of the first answer is kept, as in the official code.
        source = torch.where(ambiguous, best, 0)
        rows = torch.arange(len(chosen), device=chosen.device)
        present = decoded.present.float()
        logits = torch.where((present > 0)[:, None, None], decoded.logits[rows, chosen].float(), ABSENT_LOGIT)
        shown = (present > 0).to(decoded.tokens.dtype)[:, None]
        pointers = self.system.pointer(decoded.tokens[rows, source], shown)
        return self.entries(logits, present, decoded.scores[rows, chosen].float(), pointers), logits[:, None], present

    def entries(self, logits: Tensor, present: Tensor, scores: Tensor, pointers: Tensor) -> list[Remembered]:
        """What is remembered of each object; the memory is encoded later, from the features of the frame."""
        if self.memory.fill_holes:
            logits = torch.where(small_components(logits <= 0, self.memory.fill_holes), 0.1, logits)
        assert self.features.frame is not None
        frame = self.features.frame[0]
        return [Remembered(*v, frame=frame) for v in zip(logits, present, scores, pointers, strict=True)]

    # ---- memory ------------------------------------------------------------------------------------------------------

    def commit(self, rows: Sequence[int], tracks: list[Track]) -> None:
        """Encodes the memories of answers to prompts, now that other frames attend to them."""
        waiting = [(row, f) for row in rows for f in tracks[row].new]
        made = dict[tuple[int, int], Remembered]()
        for part in _parts(waiting, self.at_once(None)):
            kept = [tracks[row].new[f][0] for row, f in part]
            frames = torch.stack([cast(Tensor, e.frame) for e in kept])
            logits, present = (torch.stack([getattr(e, n) for e in kept]) for n in ("logits", "present"))
            encoded = self.encoded(frames, logits[:, None], present, binary=True)
            made |= {key: replace(e, memory=m, frame=None) for key, e, m in zip(part, kept, encoded, strict=True)}
        for row in rows:
            track = tracks[row]
            prompted, tracked = dict(track.prompted), dict(track.tracked)
            for f, (_, conditions) in track.new.items():
                (prompted if conditions else tracked)[f] = made[row, f]
            tracked = {f: e for f, e in tracked.items() if f not in prompted}
            tracks[row] = replace(track, prompted=prompted, tracked=tracked, new={})

    def encoded(self, frames: Tensor, logits: Tensor, present: Tensor, *, binary: bool) -> Tensor:
        """Encodes memories, which are kept in bfloat16.

        Args:
            frames: Features of the frame of each object, or of one frame for all (1, C, p, q).
            logits: Mask logits (n, 1, h, w).
            present: Logits of the prediction that the object is in the frame, (n,).
            binary: Whether masks are thresholded, for frames with prompts.
        """
        wide = functional.interpolate(logits.float(), size=self.features.size, mode="bilinear", align_corners=False)
        masks = (wide > 0).to(frames.dtype) if binary else wide.sigmoid().to(frames.dtype)
        shown = (present > 0).to(frames.dtype)[:, None]
        return self.system.memory_encoder(frames, masks, shown).bfloat16()

    def tracked(self, rows: Sequence[int], tracks: Sequence[Track]) -> dict[int, Remembered]:
        """The masks of objects without prompts in this frame. Answers to earlier prompts in it are returned again."""
        answers, groups = dict[int, Remembered](), dict[Attended, list[int]]()
        for row in rows:
            if self.index in tracks[row].prompted:
                answers[row] = tracks[row].prompted[self.index]
            elif tracks[row].prompted:
                groups.setdefault(self.attended(tracks[row], self.reverse), []).append(row)
        assert self.features.frame is not None
        for attended, group in groups.items():
            for part in _parts(group, self.at_once(attended)):
                image = self.conditioned(part, tracks, attended)
                ambiguous = torch.ones(len(part), dtype=torch.bool)
                found, logits, present = self.answered(image, self.nothing(len(part)), ambiguous)
                encoded = self.encoded(self.features.frame, logits, present, binary=False)
                answers |= {
                    row: replace(e, memory=m, frame=None) for row, e, m in zip(part, found, encoded, strict=True)
                }
        return answers

    def attended(self, track: Track, reverse: bool) -> Attended:
        """The frames that an object's features attend to."""
        return self.system.bank.select(
            self.index, list(track.prompted), track.tracked, length=self.memory.length, reverse=reverse
        )

    def conditioned(self, rows: Sequence[int], tracks: Sequence[Track], attended: Attended) -> Tensor:
        """The features of this frame after they have attended to the memories of each object."""
        like = self.features.image
        kept = [{**tracks[row].prompted, **tracks[row].tracked} for row in rows]
        memories = torch.stack([torch.stack([cast(Tensor, k[f].memory) for f, _ in attended.memories]) for k in kept])
        width = self.system.width
        pointers = torch.stack(
            [torch.stack([k[f].pointer for f, _ in attended.pointers] or [like.new_zeros(width)]) for k in kept]
        )[:, : len(attended.pointers)]
        steps = torch.tensor([step for _, step in attended.memories], device=like.device)
        distances = torch.tensor([distance for _, distance in attended.pointers], device=like.device)
        return self.system.memory_attention(
            self.features.frame, memories.to(like.dtype), steps, pointers.to(like.dtype), distances
        )

    def at_once(self, attended: Attended | None) -> int:
        """How many objects can be computed at a time with the budget."""
        most = self.system.prompts_at_once(self.features, self.budget)
        if attended is None:
            return most
        # Keys, values and their rotation in the widest layer.
        cells = self.features.image[0].numel() * len(attended.memories)
        return max(1, min(most, self.budget // (24 * cells)))


def _parts(rows: Sequence[T], step: int) -> list[Sequence[T]]:
    """Consecutive parts of at most `step` entries."""
    return [rows[first : first + step] for first in range(0, len(rows), step)]
