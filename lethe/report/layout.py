"""The one kind of table that reports are made of: title, columns, rows of text, notes.

It is rendered as markdown (tables.md), as HTML (the page) and for the terminal (rich prints a `Table` as it is). Also
how numbers are written: accuracies in per cent, probabilities and losses with four decimals, `-` for what is not there.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lethe.results.format import DEGENERATE, shown

if TYPE_CHECKING:
    import rich.table

STATUSES = ("queued", "running", "failed", "diverged", "cancelled", "lost")
WORDS = {*STATUSES, "nan", "full"}
LONG = 44
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


def escaped(text: str) -> str:
    """Markdown that shows a line of text as it is: no heading, link, HTML or emphasis comes of a name."""
    line = _MARKUP.sub(r"\\\g<0>", text)
    return _FIRST.sub(r"\\", line, count=1) if re.match(r"[#>+=:-]|\d{1,9}[.)]", line) else line


def _class(number: bool, cell: str) -> str:
    return ' class="number"' if number else ' class="long"' if len(cell) > LONG else ""
