"""The one kind of table that reports and commands show: title, columns, rows of text, notes.

    Table -> markdown() (tables.md), page.html.j2 (the page), text() (piped output), rich (the terminal)

Texts may come from anybody's files. A `Table` makes them single lines without control characters, and each format escapes
what has a meaning in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lethe.results.format import DEGENERATE, MISSING, shown

if TYPE_CHECKING:
    import rich.table

WORDS = {"queued", "running", "failed", "diverged", "cancelled", "lost", "nan", "full"}
"""Words that may stand in a column of numbers."""
_MARKUP = re.compile(
    r"[\\`*\[\]<|$]|(?<![^\W_])_|_(?![^\W_])|~(?=~)|(?<=~)~|&(?=#?\w+;)|:(?=//)|(?<=www)\.|(?<=\w)@(?=[\w-]+\.)"
)
_FIRST = re.compile(r"(?=[#>+=:-])|(?<=\d)(?=[.)])")
_NUMBER = re.compile(rf"~?[-−+]?[\d.,]*(e-?\d+)?( %| s| MB)?( \(step \d+\)| \(strength [\d.]+\)| \(\d+ steps\))?{DEGENERATE}?")


@dataclass
class Table:
    """A titled table. A row holds one text for each column; `lead` is a sentence above it, `notes` are sentences below."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    lead: str = ""

    def __post_init__(self) -> None:
        self.title, self.lead = shown(self.title), shown(self.lead, None)
        self.columns, self.notes = [shown(name) for name in self.columns], [shown(note, None) for note in self.notes]
        self.rows = [[shown(cell) for cell in row] for row in self.rows]

    @property
    def numeric(self) -> list[bool]:
        """For each column whether it holds numbers, which are set flush right, or words that may replace them."""
        columns = zip(*self.rows, strict=True) if self.rows else [() for _ in self.columns]
        return [all(_NUMBER.fullmatch(cell) or cell in WORDS for cell in column) for column in columns]

    def markdown(self) -> str:
        """The table in GitHub's markdown, under its title as a heading."""
        rule = ["-" * max(3, len(name) - 1) + "-:"[number] for name, number in zip(self.columns, self.numeric, strict=True)]
        lines = [self.columns, rule, *self.rows]
        body = "\n".join("| " + " | ".join(_MARKUP.sub(r"\\\g<0>", cell) for cell in line) + " |" for line in lines)
        notes = "".join(f"\n- {escaped(note)}" for note in self.notes)
        lead = f"{escaped(self.lead)}\n\n" if self.lead else ""
        return f"## {escaped(self.title)}\n\n{lead}{body}\n" + (f"{notes}\n" if notes else "")

    def text(self) -> str:
        """The table in aligned columns, one line per row. For thousands of rows this is far faster than rich."""
        lines = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        align = [str.rjust if number else str.ljust for number in self.numeric]
        body = ["  ".join(a(cell, w) for a, cell, w in zip(align, line, widths, strict=True)).rstrip() for line in lines]
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
        for name, number in zip(self.columns, self.numeric, strict=True):
            table.add_column(Text(name), justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return table


def table_of(title: str, rows: list[dict[str, str]], notes: list[str], lead: str = "", columns: Iterable[str] = ()) -> Table:
    """A table from rows that hold texts by column: first `columns`, then all others of any row; what a row lacks is `-`."""
    names = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    return Table(title, names, [[row.get(name, MISSING) for name in names] for row in rows], notes, lead)


def escaped(text: str) -> str:
    """Markdown that shows a line of text as it is, without headings, links, HTML or emphasis."""
    line = _MARKUP.sub(r"\\\g<0>", text)
    return _FIRST.sub(r"\\", line, count=1) if re.match(r"[#>+=:-]|\d{1,9}[.)]", line) else line
