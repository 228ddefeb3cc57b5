"""From the engine's thread to the event loop of the server."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from helix_megatron.inference.request import Output


class Mailbox:
    """Carries outputs to one event loop, and wakes it once for all that come together.

    A step of the engine has news of every sequence. Waking the loop is a system call, so two hundred sequences
    must not wake it two hundred times.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._items: deque[tuple[Callable[[Output], None], Output]] = deque()
        self._waking = False

    def listener(self, deliver: Callable[[Output], None]) -> Callable[[Output], None]:
        """A listener for a `Request`: `deliver` is called in the loop's thread, in the same order."""

        def listen(output: Output) -> None:
            # Append, then look; `_deliver` resets, then empties: nothing is left behind.
            self._items.append((deliver, output))
            if not self._waking:
                self._waking = True
                try:
                    self.loop.call_soon_threadsafe(self._deliver)
                except RuntimeError:  # the loop is closed: nobody listens any more
                    self._items.clear()

        return listen

    def _deliver(self) -> None:
        self._waking = False
        while self._items:
            deliver, output = self._items.popleft()
            deliver(output)
