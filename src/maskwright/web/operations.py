"""What a page asks for beyond edits and prompts: everything, similar objects, propagation through a clip."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

from maskwright.errors import MaskwrightError, UsageError
from maskwright.structures import Instances, Masks
from maskwright.web import proposing
from maskwright.web.assistant import Assistant
from maskwright.web.live import Client, Hub, changed_event
from maskwright.web.objects import Edit, Object, masks_of, shown, step
from maskwright.web.project import Project
from maskwright.web.propagating import (
    Followed,
    follow_by_matching,
    follow_in_images,
    follow_in_video,
    frames_between,
    is_for_videos,
)
from maskwright.web.states import Saved, State
from maskwright.web.suggesting import Suggestions

Message = dict[str, Any]
MOST_TASKS = 4  # of a page at a time


class Operations:
    """Operations that take longer than an edit; each is a task that the page can stop.

    Args:
        project: The annotations.
        suggestions: Where proposals go.
        hub: The pages.
        assistant: The promptable system; None without.
        thread: Where networks run.
        writer: The thread that writes.
    """

    def __init__(
        self,
        project: Project,
        suggestions: Suggestions,
        hub: Hub,
        assistant: Assistant | None,
        thread: Executor,
        writer: Executor,
    ):
        self.project, self.suggestions, self.hub, self.assistant = project, suggestions, hub, assistant
        self._thread, self._writer = thread, writer

    @property
    def handlers(self) -> dict[str, Callable[[Client, Message], Awaitable[None]]]:
        """The operations by their names in messages."""
        return {
            "everything": self._begin(self._everything),
            "similar": self._begin(self._similar),
            "propagate": self._begin(self._propagate),
        }

    def _begin(
        self, work: Callable[[Client, Message, int], Awaitable[None]]
    ) -> Callable[[Client, Message], Awaitable[None]]:
        """Run an operation as a task of the page."""

        async def begin(client: Client, message: Message) -> None:
            index, request = self.project.check(message.get("image")), message.get("request")
            if len(client.tasks) > MOST_TASKS or request in client.tasks:
                raise UsageError(f"{MOST_TASKS} operations are under way already; stop one, or wait")
            client.tasks[request] = asyncio.create_task(self._guarded(client, message, index, work))

        return begin

    async def _guarded(
        self, client: Client, message: Message, index: int, work: Callable[[Client, Message, int], Awaitable[None]]
    ) -> None:
        request = message.get("request")
        try:
            await work(client, message, index)
        except asyncio.CancelledError:
            client.send({"event": "finished", "request": request})
        except MaskwrightError as error:
            client.send({"event": "error", "request": request, "error": str(error)})
        except Exception as error:  # of a network, such as one out of memory; the page must not wait for ever
            client.send({"event": "error", "request": request, "error": f"the system failed: {error}"})
        finally:
            client.tasks.pop(request, None)

    async def _compute(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    # ---- proposals ---------------------------------------------------------------------------------------------------

    async def _everything(self, client: Client, message: Message, index: int) -> None:
        assistant = self._needed()
        found = await self._compute(proposing.everything, assistant, index)
        await self._proposed(client, message, index, found, None)

    async def _similar(self, client: Client, message: Message, index: int) -> None:
        assistant = self._needed()
        state = await self._compute(self.project.state, index)
        example = state.objects.get(message.get("id"))
        if example is None:
            raise UsageError(f"there is no object {shown(message.get('id'))} in this image")
        found = await self._compute(proposing.similar, assistant, index, masks_of([example], state.size))
        await self._proposed(client, message, index, found, example.label)

    async def _proposed(
        self, client: Client, message: Message, index: int, found: Instances, label: int | None
    ) -> None:
        """Add proposals to the suggestions, and tell the pages that show the image."""

        def work() -> Message:
            own = 0 if label is None and len(self.project.classes) == 1 else label
            self.suggestions.propose(index, proposals(found, self._needed().name, own))
            return self.suggestions_event(index)

        event = await self._compute(work)
        client.send({**event, "request": message.get("request")})
        self.tell_showing(index, event, but=client)

    def suggestions_event(self, index: int) -> Message:
        """Return the message with the suggestions for an image."""
        state = self.project.state(index)
        found = self.suggestions.of(index, state)
        return {"event": "suggestions", "image": index, "objects": [one.public(state.size) for one in found]}

    def tell_showing(self, index: int, event: Mapping[str, Any], but: Client | None = None) -> None:
        """Send a message to the pages that show an image."""
        for client in self.hub.clients:
            if client.image == index and client is not but:
                client.send(event)

    def _needed(self) -> Assistant:
        if self.assistant is None:
            raise UsageError("there is no promptable system; start the server with --weights")
        return self.assistant

    # ---- propagation -------------------------------------------------------------------------------------------------

    @property
    def can_propagate(self) -> bool:
        """Whether objects can be followed through a clip."""
        return self.project.source.kind == "clip" and (
            self.assistant is not None or self.suggestions.suggester is not None
        )

    async def _propagate(self, client: Client, message: Message, index: int) -> None:
        ids, until = message.get("ids"), self.project.check(message.get("until"))
        if not self.can_propagate:
            raise UsageError("objects can be followed in clips, by a system; start the server with --weights")
        first, end = self.project.source.sequence(index)
        until = min(max(until, first), end - 1)
        if not isinstance(ids, list):
            raise UsageError(f"ids must be a list of ids of objects, got {shown(ids)}")
        request = message.get("request")
        objects = await self._write(self._with_tracks, index, ids)
        saved, tracked = objects
        client.send({**propagated_event(saved, index), "request": request})
        self._tell_others(client, saved, index)
        masks = {number: masks_of([one], saved.state.size) for number, one in tracked.items()}
        made = await self._compute(self._made_by_hand, index, until)
        steps = self._follow(index, until, masks, lambda frame: made.get(frame, {}))
        while (found := await self._compute(next, steps, None)) is not None:
            saved = await self._write(self._save, found, tracked)
            client.send({**propagated_event(saved, found.frame), "request": request})
            self._tell_others(client, saved, found.frame)
        client.send({"event": "finished", "request": request})

    async def _write(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._writer, work, *arguments)

    def _tell_others(self, client: Client, saved: Saved, index: int) -> None:
        if not saved.again:
            self.hub.tell(changed_event(saved, index, self.project.user), but=client)

    def _with_tracks(self, index: int, ids: Sequence[Any]) -> tuple[Saved, dict[int, Object]]:
        """Give objects without a track a new one; returns what was saved, and the objects by their tracks."""
        state = self.project.state(index)
        missing = [id for id in ids if id not in state.objects]
        if missing or not ids:
            raise UsageError(f"there is no object {shown(missing[0])} in this image" if missing else "ids is empty")
        objects = [state.objects[id] for id in dict.fromkeys(ids)]
        known = [one.track for one in objects if one.track is not None]
        if len(set(known)) < len(known):
            raise UsageError("two of the objects are the same object of the clip; choose one of them")
        edits = [
            Edit("replace", one.id, replace(one, track=self.project.new_track(index)), one.revision)
            for one in objects
            if one.track is None
        ]
        saved = self.project.apply(index, edits, self.project.user, "propagate") if edits else None
        if saved is not None and not isinstance(saved, Saved):
            raise UsageError("the objects have been changed meanwhile; try again")
        after = self.project.state(index)
        objects = [after.objects[one.id] for one in objects]
        shown_saved = Saved(after, objects, [], again=not edits)
        return shown_saved, {one.track: one for one in objects if one.track is not None}

    def _made_by_hand(self, index: int, until: int) -> dict[int, dict[int, Masks]]:
        """The masks that a person has made or changed in other frames, by frame and track."""
        found: dict[int, dict[int, Masks]] = {}
        for frame in frames_between(index, until):
            state = self.project.state(frame)
            own = {one.track: one for one in state.objects.values() if one.track is not None and is_by_hand(one)}
            if own:
                found[frame] = {track: masks_of([one], state.size) for track, one in own.items()}
        return found

    def _follow(
        self, index: int, until: int, masks: dict[int, Masks], known: Callable[[int], Mapping[int, Masks]]
    ) -> Iterator[Followed]:
        suggester = self.suggestions.suggester
        if self.assistant is not None:
            follow = follow_in_video if is_for_videos(self.assistant) else follow_in_images
            return follow(self.assistant, index, until, masks, known)
        assert suggester is not None
        return follow_by_matching(suggester.find, index, until, masks, known)

    def _save(self, found: Followed, tracked: Mapping[int, Object]) -> Saved:
        """Save the objects of a frame; those that a person has made are kept."""
        while True:
            state = self.project.state(found.frame)
            edits = self._edits(state, found, tracked)
            if not edits:
                return Saved(state, [], [], again=True)
            saved = self.project.apply(found.frame, edits, self.project.user, "propagate")
            if isinstance(saved, Saved):
                return saved

    def _edits(self, state: State, found: Followed, tracked: Mapping[int, Object]) -> list[Edit]:
        there = {one.track: one for one in state.objects.values() if one.track is not None}
        name = self._name()
        edits: list[Edit] = []
        for track, like in tracked.items():
            before, mask = there.get(track), found.masks.get(track)
            if before is not None and is_by_hand(before):
                continue
            if mask is None or not int(mask.areas()[0]):
                if before is not None:
                    edits.append(Edit("remove", before.id, None, before.revision))
                continue
            counts = mask.rle()[0]["counts"].decode("ascii")
            score = round(found.scores[track], 4)
            made = (step(name, "propagated"),)
            if before is None:
                id = f"t{track}-{secrets.token_hex(6)}"
                edits.append(Edit("add", id, Object(id, like.label, counts, made, 0, score, track)))
            else:
                after = Object(before.id, like.label, counts, made, 0, score, track)
                edits.append(Edit("replace", before.id, after, before.revision))
        return edits

    def _name(self) -> str:
        suggester = self.suggestions.suggester
        return self.assistant.name if self.assistant is not None else suggester.name if suggester is not None else ""


def proposals(found: Instances, name: str, label: int | None) -> list[Object]:
    """Return what a system has found as suggestions."""
    assert found.masks is not None
    made = (step(name, "suggestion"),)
    mark = secrets.token_hex(6)
    scores = [1.0] * len(found) if found.scores is None else [float(score) for score in found.scores]
    return [
        Object(f"p{mark}-{n}", label, code["counts"].decode("ascii"), made, 0, round(score, 4))
        for n, (code, score) in enumerate(zip(found.masks.rle(), scores, strict=True))
    ]


def is_by_hand(one: Object) -> bool:
    """Return whether a person has made an object, or changed it since it was propagated."""
    return not one.made or one.made[-1]["how"] != "propagated"


def propagated_event(saved: Saved, index: int) -> Message:
    """Return the message with the objects of a frame."""
    state = saved.state
    return {
        "event": "propagated",
        "image": index,
        "version": state.version,
        "objects": [one.public(state.size) for one in saved.changed],
        "removed": saved.removed,
    }
