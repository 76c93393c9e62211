"""The numbers in a log's prose, compared with the cells of its tables: a number that no cell rounds to may be a slip."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lethe.errors import printable

_NUMBER = re.compile(r"(?<![\w.])(\d++(?:\.\d++)?+)(?:\s*+[-–]\s*+(\d++(?:\.\d++)?+))?(\s*+%)?(?!\w|\.\d)")


@dataclass(frozen=True)
class Cell:
    """A number in a table: a share of 1 (written as a fraction or in per cent), or a loss."""

    line: int
    section: str
    value: float
    is_share: bool


def unmatched(prose: list[tuple[int, str, str]], cells: list[Cell]) -> list[dict[str, Any]]:
    """The numbers of the prose, if they have a decimal point or a per cent sign, that no cell of their section rounds to.

    `prose` are lines as (line number, section, text). A hint names the first cell of another section that has the number.
    """
    values: dict[bool, list[tuple[float, int]]] = {
        False: sorted((cell.value, i) for i, cell in enumerate(cells)),
        True: sorted((100 * cell.value, i) for i, cell in enumerate(cells) if cell.is_share),
    }
    found = []
    for line, section, text in prose:
        for start, end, digits, percent in _numbers(re.sub(r"`[^`]*`", lambda code: " " * len(code[0]), text)):
            number, half = float(digits), 0.5 * 10.0 ** -len(digits.partition(".")[2]) + 1e-9
            first = bisect_left(values[percent], (number - half, -1))
            last = bisect_left(values[percent], (number + half, math.inf))
            there = [cells[i] for _, i in values[percent][first:last]]
            if any(cell.section == section for cell in there):
                continue
            other = min(there, key=lambda cell: cell.line, default=None)
            hint = f"line {other.line} has it, under '{other.section}'" if other else ""
            around = " ".join(text[max(0, start - 50) : end + 30].split())
            shown = printable(digits, 40) + (" %" if percent else "")
            found.append({"line": line, "section": section, "number": shown, "text": around, "hint": hint})
    return found


def _numbers(text: str) -> Iterator[tuple[int, int, str, bool]]:
    """The numbers of a text (both ends of a range) with their place, their digits, and whether they are per cents."""
    for match in _NUMBER.finditer(text):
        for digits in filter(None, match.groups()[:2]):
            if "." in digits or match[3]:
                yield *match.span(), digits, bool(match[3])
