"""A second, larger home for cached blocks: host memory or a disk, by plan.

A full block that is evicted from the pool is saved to a slot of the tier; a prefix that goes on there is loaded back
into fresh blocks. The tier knows keys and slots only; the execution side moves the bytes, saves before loads.
"""

from __future__ import annotations

from collections import OrderedDict

from servekit.core.prefix_cache import CachedBlock


class OffloadTier:
    """Keys of saved blocks, least recently used first.

    Args:
        num_slots: blocks that it holds.
    """

    def __init__(self, num_slots: int) -> None:
        self._saved: OrderedDict[bytes, tuple[int, CachedBlock]] = OrderedDict()
        self._num_slots = num_slots
        self._num_used = 0  # slots from 0 on that were ever given out
        self._free: list[int] = []
        self._loading: set[int] = set()  # slots that the plan in the making reads
        self._saves: list[tuple[int, int]] = []  # (block, slot)
        self._loads: list[tuple[int, int]] = []  # (slot, block)

    def __len__(self) -> int:
        return len(self._saved)

    def find(self, key: bytes) -> CachedBlock | None:
        found = self._saved.get(key)
        return found[1] if found else None

    def save(self, block: int, content: CachedBlock) -> None:
        """``block`` is about to be given out anew: keep what is in it, if it is full and there is a slot."""
        if content.key is None:
            return
        if content.key in self._saved:
            self._saved.move_to_end(content.key)
            return
        slot = self._take_slot()
        if slot is not None:
            self._saved[content.key] = (slot, content)
            self._saves.append((block, slot))

    def _take_slot(self) -> int | None:
        if self._free:
            return self._free.pop()
        if self._num_used < self._num_slots:
            self._num_used += 1
            return self._num_used - 1
        for key, (slot, _) in self._saved.items():
            if slot not in self._loading:
                del self._saved[key]
                return slot
        return None

    def hold(self, keys: list[bytes]) -> list[int]:
        """The slots of ``keys``, which stay as they are until the plan is made."""
        slots = []
        for key in keys:
            self._saved.move_to_end(key)
            slots.append(self._saved[key][0])
        self._loading.update(slots)
        return slots

    def load(self, slot: int, block: int) -> None:
        self._loads.append((slot, block))

    def take_transfers(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The saves and loads of the plan that is made now."""
        saves, loads = self._saves, self._loads
        self._saves, self._loads = [], []
        self._loading.clear()
        return saves, loads

    def forget_all(self) -> None:
        """Nothing saved before is found again."""
        self._free += [slot for slot, _ in self._saved.values()]
        self._saved.clear()
