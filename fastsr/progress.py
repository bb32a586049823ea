"""A progress bar on stderr."""

from __future__ import annotations

import sys

WIDTH = 30


def draw(share: float, words: str) -> None:
    """Draws the bar over the line that is there. share: of what is done, 0..1."""
    filled = round(min(max(share, 0.0), 1.0) * WIDTH)
    text = f"[{'#' * filled}{'.' * (WIDTH - filled)}] {words} "
    print(f"\r\033[K{printable(text)}", end="", file=sys.stderr, flush=True)


def clear() -> None:
    """Empties the bar's line."""
    print("\r\033[K", end="", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """With names that are not UTF-8, which printing would not survive, made readable."""
    return text.encode("utf-8", "backslashreplace").decode()
