"""The one kind of table that reports are made of: title, columns, rows of text, notes.

It is rendered as markdown (tables.md), as HTML (the page) and for the terminal (rich prints a `Table` as it is). Also
how numbers are written: accuracies in per cent, probabilities and losses with four decimals, `-` for what is not there.
"""

from __future__ import annotations

import html
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lethe.errors import printable

if TYPE_CHECKING:
    import rich.table

MISSING = "-"
DEGENERATE = "†"
DEGENERATE_NOTE = f"{DEGENERATE} degenerate: one answer position was chosen nearly always, so the number says nothing."
STATUSES = ("queued", "running", "failed", "diverged", "cancelled", "lost")
WORDS = {*STATUSES, "nan", "full"}
LONG = 44
LONGEST = 2000
_MARKUP = re.compile(
    r"[\\`*\[\]<|$]|(?<![^\W_])_|_(?![^\W_])|~(?=~)|(?<=~)~|&(?=#?\w+;)|:(?=//)|(?<=www)\.|(?<=\w)@(?=[\w-]+\.)"
)
_FIRST = re.compile(r"(?=[#>+=:-])|(?<=\d)(?=[.)])")
_NUMBER = re.compile(rf"~?[-−+]?[\d.,]*(e-?\d+)?( %| s| MB)?( \(step \d+\)| \(strength [\d.]+\)| \(\d+ steps\))?{DEGENERATE}?")


@dataclass
class Table:
    """A titled table. `rows` hold one text a column; `lead` is a sentence above it, `notes` are sentences below.

    Its texts may come from anybody's files: here they become lines that a terminal, a page and a chart can show.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    lead: str = ""

    def __post_init__(self) -> None:
        self.title, self.lead = shown(self.title), shown(self.lead, None)
        self.columns, self.notes = [shown(name) for name in self.columns], [shown(note, None) for note in self.notes]
        self.rows = [[shown(cell) for cell in row] for row in self.rows]

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers (or statuses in their place), and is set flush right."""
        cells = [row[column] for row in self.rows]
        return all(_NUMBER.fullmatch(cell) or cell in WORDS for cell in cells)

    def markdown(self) -> str:
        """The table in GitHub's markdown, under its title as a heading."""
        rule = [("-" * max(3, len(name) - 1)) + (":" if self.is_numeric(i) else "-") for i, name in enumerate(self.columns)]
        lines = [self.columns, rule, *self.rows]
        body = "\n".join("| " + " | ".join(_MARKUP.sub(r"\\\g<0>", cell) for cell in line) + " |" for line in lines)
        notes = "".join(f"\n- {escaped(note)}" for note in self.notes)
        lead = f"{escaped(self.lead)}\n\n" if self.lead else ""
        return f"## {escaped(self.title)}\n\n{lead}{body}\n" + (f"{notes}\n" if notes else "")

    def html(self) -> str:
        """The table as HTML without its title; headers may break at underscores, long texts wrap."""
        numeric = [self.is_numeric(i) for i in range(len(self.columns))]
        head = "".join(
            f'<th scope="col"{_class(number, name)}>{html.escape(name).replace("_", "_<wbr>")}</th>'
            for name, number in zip(self.columns, numeric, strict=True)
        )
        rows = "".join(
            "<tr>"
            + "".join(f"<td{_class(number, cell)}>{html.escape(cell)}</td>" for cell, number in zip(row, numeric, strict=True))
            + "</tr>\n"
            for row in self.rows
        )
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        lead = f"<p>{html.escape(self.lead)}</p>\n" if self.lead else ""
        body = f'{lead}<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n'
        return body + (f'<ul class="notes">{notes}</ul>\n' if notes else "")

    def text(self) -> str:
        """The table in aligned columns, one line a row whatever the width: what rich sets for a screen takes it far longer."""
        flush = [self.is_numeric(i) for i in range(len(self.columns))]
        lines = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        pad = [(lambda cell, width: cell.rjust(width)) if right else (lambda cell, width: cell.ljust(width)) for right in flush]
        body = ["  ".join(p(c, w) for p, c, w in zip(pad, line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([self.title, *([self.lead] if self.lead else []), *body, *self.notes])

    def __rich__(self) -> rich.table.Table:
        import rich.table
        from rich import box
        from rich.text import Text

        table = rich.table.Table(
            title=Text.assemble((self.title, "bold"), f"\n{self.lead}" if self.lead else ""),
            title_justify="left",
            caption=Text("\n".join(self.notes)) if self.notes else None,
            caption_justify="left",
            box=box.SIMPLE_HEAD,
        )
        for i, name in enumerate(self.columns):
            table.add_column(Text(name), justify="right" if self.is_numeric(i) else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return table


def shown(text: str, most: int | None = LONGEST) -> str:
    """Text of unknown origin on one line: no control characters, no half characters, not longer than anybody reads."""
    return printable(" ".join(text.split()), most)


def escaped(text: str) -> str:
    """Markdown that shows a line of text as it is: no heading, link, HTML or emphasis comes of a name."""
    line = _MARKUP.sub(r"\\\g<0>", text)
    return _FIRST.sub(r"\\", line, count=1) if re.match(r"[#>+=:-]|\d{1,9}[.)]", line) else line


def percent(share: float | None, decimals: int = 2) -> str:
    """A share as a percentage: `41.25 %`."""
    if share is None:
        return MISSING
    return f"{100 * share:.{decimals}f} %" if math.isfinite(share) else "nan"


def decimal(value: float | None) -> str:
    """A loss or a probability with four decimals."""
    if value is None or abs(value) >= 1e12:
        return compact(value)
    return f"{round(value, 4) + 0.0:.4f}"  # + 0.0 turns −0 into 0


def compact(value: float | None) -> str:
    """A number of any size in four significant digits."""
    return MISSING if value is None else f"{value:.4g}"


def result(evaluated: dict[str, Any] | None) -> str:
    """A task's result: accuracy in per cent, mean probability with four decimals; degenerate ones marked."""
    if evaluated is None:
        return MISSING
    text = "~" if evaluated.get("approximate") else ""
    text += percent(evaluated["acc"]) if "acc" in evaluated else decimal(evaluated["correct_prob"])
    return text + (DEGENERATE if evaluated.get("degenerate") else "")


def interval(evaluated: dict[str, Any]) -> str:
    """A task's 95 % interval, in the unit of its result."""
    if "acc" in evaluated:
        return f"{100 * evaluated['low']:.2f} to {percent(evaluated['high'])}"
    return f"{evaluated['low']:.4f} to {evaluated['high']:.4f}"


def setting(value: Any) -> str:
    """A setting's value as it would be written in a recipe, on one line."""
    if isinstance(value, list):
        return ", ".join(setting(item) for item in value) or "[]"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {setting(item)}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def short(digest: str | None) -> str:
    """The beginning of a hash, with what kind of hash it is."""
    if not digest:
        return MISSING
    *kind, hexadecimal = digest.split(":")
    return ":".join([*kind, hexadecimal[:12]])


def seconds(duration: float) -> str:
    """A duration in two units at most: `42 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    if not math.isfinite(duration):
        return MISSING
    whole = round(duration)
    for size, unit, rest_size, rest_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // rest_size} {rest_unit}"
    return f"{duration:.1f} s" if duration < 10 else f"{whole} s"


def _class(number: bool, cell: str) -> str:
    return ' class="number"' if number else ' class="long"' if len(cell) > LONG else ""
