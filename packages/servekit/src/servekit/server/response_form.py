"""An answer in the form of ``/v1/responses``: its items, and the events that tell of them as they grow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from servekit.server.blocks import BlockEvent, Blocks, Kind, Move
from servekit.server.turn import Piece, Turn

Json = dict[str, Any]


class ResponseForm:
    """One response on its way.

    Args:
        about: what it repeats of the request.
    """

    def __init__(self, response_id: str, about: Json, turn: Turn) -> None:
        self.id = response_id
        self._about = about
        self._turn = turn
        self._created = int(time.time())
        self._blocks = Blocks()
        self._number = -1
        self._items: list[Json] = []
        self.status = "in_progress"
        self.error: Json | None = None

    def to_json(self) -> Json:
        ended = self.status in ("completed", "incomplete")
        made = {"id": self.id, "object": "response", "created_at": self._created, "status": self.status}
        made |= self._about | {"error": self.error, "output": self._items}
        made["incomplete_details"] = {"reason": "max_output_tokens"} if self.status == "incomplete" else None
        made["usage"] = self._usage() if ended else None
        return made

    def _usage(self) -> Json:
        usage = self._turn.usage.to_json()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._turn.usage.num_reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }

    def begin(self) -> Iterator[Json]:
        yield self._event("response.created", response=self.to_json())
        yield self._event("response.in_progress", response=self.to_json())

    def add(self, piece: Piece) -> Iterator[Json]:
        """The events of ``piece``; the items grow with them."""
        for event in self._blocks.add(piece, self._turn.answers[0]):
            yield from self._told(event)
        if piece.finish_reason is not None:
            for event in self._blocks.finish():
                yield from self._told(event)
            self.status = "incomplete" if piece.finish_reason == "length" else "completed"

    def end(self) -> Json:
        return self._event(f"response.{self.status}", response=self.to_json())

    def fail(self, status: str, error: Json | None = None) -> None:
        """It ended before its end: ``failed`` or ``cancelled``."""
        for item in self._items:
            if item.get("status") == "in_progress":
                item["status"] = "incomplete"
        self.status, self.error = status, error

    def _event(self, kind: str, **more: Any) -> Json:
        self._number += 1
        return {"type": kind, "sequence_number": self._number} | more

    def _told(self, event: BlockEvent) -> Iterator[Json]:
        match event.move:
            case Move.OPEN:
                self._items.append(self._new_item(event))
                item = self._items[-1]
                yield self._event("response.output_item.added", output_index=event.index, item=_empty(item))
                if event.kind is not Kind.CALL:
                    yield self._of_item(event, "content_part.added", part=dict(_part(item)))
            case Move.MORE:
                yield from self._more(event)
            case Move.CLOSE:
                yield from self._close(event)

    def _new_item(self, event: BlockEvent) -> Json:
        if event.call is not None:
            about = {"call_id": event.call.id, "name": event.call.name, "arguments": ""}
            return {"type": "function_call", "id": self._item_id("fc", event)} | about | {"status": "in_progress"}
        if event.kind is Kind.REASONING:
            content = [{"type": "reasoning_text", "text": ""}]
            made: Json = {"type": "reasoning", "id": self._item_id("rs", event), "summary": [], "content": content}
            return made | {"status": "in_progress"}
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        about = {"id": self._item_id("msg", event), "role": "assistant"}
        return {"type": "message"} | about | {"content": [part], "status": "in_progress"}

    def _item_id(self, prefix: str, event: BlockEvent) -> str:
        return f"{prefix}_{self.id[5:]}{event.index}"

    def _more(self, event: BlockEvent) -> Iterator[Json]:
        item = self._items[event.index]
        if event.kind is Kind.CALL:
            item["arguments"] += event.text
            yield self._of_item(event, "function_call_arguments.delta", delta=event.text)
            return
        _part(item)["text"] += event.text
        if event.kind is Kind.REASONING:
            yield self._of_item(event, "reasoning_text.delta", delta=event.text)
        else:
            yield self._of_item(event, "output_text.delta", delta=event.text, logprobs=[])

    def _close(self, event: BlockEvent) -> Iterator[Json]:
        item = self._items[event.index]
        item["status"] = "completed"
        if event.kind is Kind.CALL:
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_item(event, "function_call_arguments.done", **done)
        else:
            text = _part(item)["text"]
            if event.kind is Kind.REASONING:
                yield self._of_item(event, "reasoning_text.done", text=text)
            else:
                yield self._of_item(event, "output_text.done", text=text, logprobs=[])
            yield self._of_item(event, "content_part.done", part=dict(_part(item)))
        yield self._event("response.output_item.done", output_index=event.index, item=item)

    def _of_item(self, event: BlockEvent, kind: str, **more: Any) -> Json:
        item = self._items[event.index]
        place: Json = {"item_id": item["id"], "output_index": event.index}
        if event.kind is not Kind.CALL:
            place["content_index"] = 0
        return self._event(f"response.{kind}", **place, **more)


def _part(item: Json) -> Json:
    part: Json = item["content"][0]
    return part


def _empty(item: Json) -> Json:
    """The item as it is announced, before its first part."""
    return item | {"content": []} if "content" in item else dict(item)
