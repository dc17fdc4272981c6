"""Regular expressions that users write: what cannot be compiled or matched in bounded time is named.

They are written as for Python's `re`; the package `regex` runs them, as it can be stopped.
"""

from __future__ import annotations

import re
import time

import regex

MOST_COPIES = 100_000  # of its characters once repetitions are written out, as regex does: {1000} nested fills memory
SECONDS, SECONDS_A_LINE = 5.0, 1e-3  # of processor time; ordinary patterns take microseconds a line
TOKEN = re.compile(r"(?s)\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d*)(?:,(\d*))?\}|.")


class SlowPatternError(ValueError):
    """A pattern whose matching takes longer than any text should need."""


def compiled(pattern: str) -> regex.Pattern[str]:
    """A pattern of `re`'s syntax.

    Raises:
        ValueError: it is none, or repeats too much.
    """
    try:
        re.compile(pattern)
        if _copies(pattern) > MOST_COPIES:
            raise ValueError("its repetitions are too many; write * or + instead of large numbers in braces")
        return regex.compile(pattern)
    except (re.error, regex.error, OverflowError, MemoryError) as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("its parentheses are nested too deep") from None


def _copies(pattern: str) -> int:
    """How many characters there are once every {n} is written out."""
    open_groups, last = [0], 0
    for token in TOKEN.finditer(pattern):
        if token[0] == "(":
            open_groups.append(0)
        elif token[0] == ")" and len(open_groups) > 1:
            last = open_groups.pop()
            open_groups[-1] += last
        elif token[1] or token[2]:
            times = max(int(token[1] or 0), int(token[2] or 0), 1)
            open_groups[-1] += last * (times - 1)
            last *= times
        else:
            last = 1
            open_groups[-1] += 1
    return sum(open_groups)


class LinePattern:
    """A pattern matched against the beginning of line after line, for a limited time in all.

    The line is matched without its end, so that `$` and the last line mean the same in files of every system; a pattern
    that spells a line end itself, as \\n or \\r, sees the line as it stands.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = compiled(pattern)
        self.ends = "\\n" in pattern or "\\r" in pattern or "\n" in pattern
        self.left = SECONDS

    def matches(self, line: str) -> bool:
        """Whether the line begins with the pattern.

        Raises:
            SlowPatternError: the time is used up.
        """
        if not self.ends:
            line = line.removesuffix("\n").removesuffix("\r")
        before = time.process_time()
        try:
            found = self.pattern.match(line, timeout=self.left)
        except TimeoutError:
            raise SlowPatternError(f"tries too many ways to match the line {line[:50]!r}") from None
        self.left += SECONDS_A_LINE - (time.process_time() - before)
        if self.left <= 0:
            raise SlowPatternError(f"takes more than {SECONDS_A_LINE * 1000:g} milliseconds a line")
        return found is not None
