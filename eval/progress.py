"""One live line: what is done, how fast, how long still. On a terminal it is rewritten in place, elsewhere printed now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

PRINT_EVERY_S = 10.0


class LiveLine:
    """A context manager; `show(text)` replaces the line.

    Where standard error is no terminal the line is printed at most every `PRINT_EVERY_S` seconds, and once at the end.
    """

    def __init__(self):
        self.console = Console(file=sys.stderr, highlight=False)
        self.live: Live | None = None
        self.text, self.printed, self.last = "", "", 0.0

    def __enter__(self) -> LiveLine:
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=5, transient=False)
            self.live.start()
        return self

    def show(self, text: str) -> None:
        """Replace the line."""
        self.text = text
        if self.live:
            self.live.update(Text(text, no_wrap=True, overflow="ellipsis"))
        elif time.monotonic() - self.last > PRINT_EVERY_S:
            self._print()

    def leave(self, text: str) -> None:
        """Print a line that stays, above the live one."""
        if self.live:
            self.live.console.print(Text(text))
        else:
            print(text, file=sys.stderr, flush=True)

    def _print(self) -> None:
        if self.text != self.printed:
            print(self.text, file=sys.stderr, flush=True)
            self.printed, self.last = self.text, time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()
        else:
            self._print()


def duration(seconds: float) -> str:
    """ "1:02:03" or "2:03"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
