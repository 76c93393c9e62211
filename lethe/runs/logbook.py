"""Reading an experiment log written by hand (markdown): its tables, each with the settings stated above it, and its prose.

    text -> read(): tables and prose        column(): what a header means        setting(), phrases(): settings in words

The words that are understood stand below. What is stated nearer to a table wins over what is stated further away. What the
document states before its first section is about unlearning, not about attacks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_block.table import escapedSplit, table
from markdown_it.token import Token

from lethe import config as c
from lethe.config.checks import options, types_of
from lethe.errors import printable
from lethe.methods.method import every

TASKS = {
    "wmdp": "wmdp",  # a task of its own: the bare name does not say which of the others is meant
    "wmdp bio": "wmdp_bio",
    "wmdp robust": "wmdp_bio_robust",
    "wmdp bio robust": "wmdp_bio_robust",
    "wmdp cloze": "wmdp_bio_cloze",
    "wmdp bio cloze": "wmdp_bio_cloze",
    "mmlu": "mmlu",
    "mmlu stem": "mmlu_stem",
} | {task.replace("_", " "): task for task in c.LAB_TASKS}
KINDS: list[type] = [c.TamperConfig, *every()]
TYPES = {name: hint for kind in KINDS for name, hint in types_of(kind).items()}
OPTIMIZERS = set(get_args(TYPES["optimizer"]))
NOT_SETTINGS = {"name", "out", "eval", "lora", "time_limit"}
"""Fields that a log does not state as a setting."""
SETTINGS = {name: name for name in TYPES if name not in NOT_SETTINGS} | {
    "retain": "retain_coef",
    "remove": "remove_coef",
    "pdbs": "per_device_train_batch_size",
    "learning_rate": "lr",
    "lora_r": "lora.r",
    "rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "steps": "steps",
    "updates": "updates",
    "optimizer_updates": "updates",
    "forward_passes": "forward_passes",
    "kl_divergence_retain": "retain_loss",
}
"""Field of a run's settings or plan, by the log's word for it."""
_COUNT = r"(?<![\d.,])(\d{1,12}+)"
PHRASES = {
    rf"{_COUNT} per device": "per_device_train_batch_size",
    r"grad(?:ient)?[ _]accumulation(?: steps)? (\d{1,12})": "gradient_accumulation_steps",
    r"effective batch(?: size)?(?: of)? (\d{1,12})": "effective_batch",
    rf"{_COUNT} (?:\w++ )?(?:examples|documents)": "num_train_examples",
    r"eval(?:uated?)? every (\d{1,12})": "eval.every",
    rf"{_COUNT} steps": "steps",
    rf"{_COUNT} (?:optimizer )?updates": "updates",
    rf"{_COUNT} forward passes": "forward_passes",
    rf"{_COUNT} ?ep(?:ochs?)?\b": "epochs",
}
ROLES = {
    "job": r"(?:slurm )?job(?: ?id)?",
    "checkpoint": r"checkpoint|revision",
    "status": r"status",
    "notes": r"notes?|comments?|remarks?",
    "model": r"model",
    "label": r"tamper optimizer|attack|run|name",
}
AT_STEP = (
    ("point", r"start(?:ing)? (?P<task>.+)(?P<step>)"),
    ("point", r"step (?P<step>\d{1,12})(?: (?P<task>.+))?"),
    ("point", r"after (?P<step>\d{1,12}) (?:steps?|updates)(?: (?P<task>.+))?"),
    ("final", r"final(?: (?P<task>[^(]+?))?(?: \((?:step )?(?P<step>\d{1,12})(?: steps?| updates)?\))?"),
)
"""Headers of results during and after an attack, such as `Step 500 WMDP` or `Final (110 steps)`."""
NUMBER = r"[-+]?\d{1,30}(?:\.\d{1,30})?(?:e[-+]?\d{1,2})?"
"""A finite number. All patterns here take time in proportion to the text: none tries a long word from its middle."""
LONGEST_CELL = 2000
"""Characters above which the markup of a cell is not removed: no number or name is that long, and it may take long."""
_BULLETS = {"- ", "+ ", "* "}
_PAIR = re.compile(r"\b([A-Za-z_]\w*+)`?\s*+=\s*+([^\s,;()]++)")
_STATED = re.compile(r"(?:[-+*] )?(?:\*\*)?`?([A-Za-z][\w ]*?)`?(?:\*\*)? ?:(?:\*\*)? (.+)")
_SETTINGS_LINE = re.compile(r"\**\s*(?:[\w ]*\b(?:settings?|config(?:uration)?)\b|goal\b)", re.IGNORECASE)
_STARTING = re.compile(rf"start(?:ing)? ([A-Za-z][\w ]{{0,60}}?) ?: ?(~? ?{NUMBER} ?%?)", re.IGNORECASE)
_NOTE = re.compile(r"(?:\\(\*+)|([†‡§])|\[\^(\w+)\]:)\s*(.+)")
_MARK = re.compile(r"\*+|[†‡§]|\[\^(\w++)\]")
_MARKUP = re.compile(r"[*_`\[<\\&]")
_BREAKS = re.compile("[\x0b\x0c\x1c-\x1f\x85\u2028\u2029]")
"""Line breaks in Python and in some editors, but not in markdown."""


@dataclass
class Section:
    """A heading, and the settings and starting values that the text below it has stated so far."""

    level: int
    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    starting: dict[str, str] = field(default_factory=dict)


@dataclass
class LogTable:
    """A table of the log. `rows` are (line number, cells), `notes` are footnotes by their mark."""

    line: int
    sections: list[Section]
    columns: list[str]
    rows: list[tuple[int, list[str]]]
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """The headings above the table; without the document's title, if there are others."""
        titles = [s.title for s in self.sections if s.level > 1] or [s.title for s in self.sections]
        return " › ".join(filter(None, titles))

    @property
    def starting(self) -> dict[str, str]:
        """Values at step 0, by the log's name for the task."""
        return {name: value for section in self.sections for name, value in section.starting.items()}

    def settings(self, own: bool) -> dict[str, Any]:
        """The settings that hold for the rows; with `own`, without those that the document states before its first section."""
        chosen = [s for s in self.sections if s.level > 1] if own else self.sections
        return {name: value for s in chosen or self.sections for name, value in s.settings.items()}


@dataclass
class Column:
    """What a header means: its role, the setting or task that it names, and the step."""

    header: str
    role: str
    name: str = ""
    step: int | None = None
    percent: bool = False


def read(text: str) -> tuple[list[LogTable], list[tuple[int, str, str]]]:
    """The tables of a log, and its prose as (line number, section, the line without the settings that it states).

    The markdown parser decides what is a table, a heading or a list, so code, comments and HTML are not read. A paragraph that
    looks like a table but is none becomes a table without rows, so that the import can name it.
    """
    reader = _Reader()
    for token in _MARKDOWN.parse(_clean(text)):
        reader.take(token)
    return reader.tables, reader.prose


class _Reader:
    """The state of reading: the headings above the current line, and whether bullets list settings."""

    def __init__(self) -> None:
        self.tables: list[LogTable] = []
        self.prose: list[tuple[int, str, str]] = []
        self.sections = [Section(0, "")]
        self.outside: list[list[Section]] = []
        self.listing = self.heading = False
        self.mark = ""

    def take(self, token: Token) -> None:
        """Read the next token of the parser."""
        first = token.map[0] + 1 if token.map else 0
        if token.type in {"blockquote_open", "list_item_open"}:
            self.outside.append(self.sections)  # a heading inside a quotation or list ends with it
            self.mark = f"{token.info}{token.markup} " if token.type == "list_item_open" else ""
        elif token.type in {"blockquote_close", "list_item_close"}:
            self.sections, self.mark = self.outside.pop(), ""
        elif token.type == "heading_open":
            level = int(token.tag[1])
            self.sections = [s for s in self.sections if s.level < level] + [Section(level, "")]
            self.heading, self.mark = True, f"{token.markup} " if token.markup[0] == "#" else ""
        elif token.type == "table":
            self._table(first, **token.meta)
        elif token.type == "inline":
            self._lines(first, [" ".join(line.split()) for line in token.content.split("\n")])
            self.heading = False

    def _table(self, line: int, columns: list[str], rows: list[tuple[int, list[str]]]) -> None:
        sections = [dataclasses.replace(section, settings=dict(section.settings)) for section in self.sections]
        self.tables.append(LogTable(line, sections, columns, rows))
        self.listing, self.mark = False, ""

    def _lines(self, first: int, lines: list[str]) -> None:
        """Read the lines of a heading or a paragraph."""
        here = self.sections[-1]
        if self.heading:
            here.title = " ".join(lines)
            here.settings = phrases(here.title)
        elif lines[0].startswith("|"):
            self._table(first, _cells(lines[0]), [])
        part = next((s.title for s in self.sections if s.level == 2), here.title)
        is_bullet, lines[0] = self.mark in _BULLETS, self.mark + lines[0]
        for number, line in enumerate(lines, start=first):
            if not self.heading and self.tables and (note := _NOTE.match(line)):
                self.tables[-1].notes[note[1] or note[2] or note[3]] = note[4]
            if is_bullet:
                self.listing = self.listing and not self.heading
            else:
                self.listing = not self.heading and _SETTINGS_LINE.match(line) is not None
            left = line if self.heading else _take_settings(line, here, self.listing and is_bullet)
            self.prose.append((number, part, left))
            is_bullet = False
        self.mark = ""


def _clean(text: str) -> str:
    """The log with markdown's line breaks alone, and with escapes in place of control characters."""
    text = _BREAKS.sub(" ", text.replace("\ufeff", "").replace("\0", "\ufffd"))
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in re.split(r"\r\n?|\n", text))


def _cells(line: str) -> list[str]:
    """The cells of a table's line, as many as it has."""
    cells = escapedSplit(line.strip())
    inner = cells[cells[0] == "" : len(cells) - (len(cells) > 1 and cells[-1] == "")]
    return [" ".join(cell.split()) for cell in inner]


def _table(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """The parser's rule for tables, but with the cells as they are.

    The parser's own rule pads and cuts rows to the width of the header, and ends a table after 65,536 padded cells.
    """
    before = len(state.tokens)
    if not table(state, start, min(start + 2, end), silent):
        return False
    if not silent:
        del state.tokens[before:]
        stops = state.md.block.ruler.getRules("blockquote")
        line = start + 2
        while (
            line < end and state.sCount[line] >= state.blkIndent and not state.isEmpty(line) and not state.is_code_block(line)
        ):
            if any(stop(state, line, end, True) for stop in stops):
                break
            line += 1
        texts = [
            (n + 1, state.src[state.bMarks[n] + state.tShift[n] : state.eMarks[n]]) for n in (start, *range(start + 2, line))
        ]
        (_, columns), *rows = [(number, _cells(text)) for number, text in texts]
        made = state.push("table", "", 0)
        made.map, made.meta, state.line = [start, line], {"columns": columns, "rows": rows}, line
    return True


_MARKDOWN = MarkdownIt("commonmark").enable("table").disable(["inline", "reference"])  # [^1]: is a note
_MARKDOWN.block.ruler.at("table", _table, {"alt": ["paragraph"]})


def _take_settings(line: str, section: Section, listed: bool) -> str:
    """Add the settings that a line states to `section`; return the rest. `listed`: it is a bullet of a list of settings."""
    if starting := _STARTING.findall(line):
        section.starting |= {spaced(name): value for name, value in starting}
        return _STARTING.sub("", line)
    if stated := _STATED.match(line):
        found = setting(stated[1], stated[2])
        if found is None and listed:
            found = {stated[1].strip("` "): stated[2]}  # no setting of Lethe: imported as text
        if found is not None:
            section.settings |= found | phrases(stated[2])
            return ""
    if _SETTINGS_LINE.match(line):
        for group in re.findall(r"\([^()]*\)", line):
            if found := phrases(group):
                section.settings |= found
                line = line.replace(group, "")
    return line


def phrases(text: str) -> dict[str, Any]:
    """Settings stated in passing: `(512 bio examples, lr=2e-5, eval every 100 steps)`."""
    found: dict[str, Any] = {}
    for pattern, name in PHRASES.items():
        if match := re.search(pattern, text, re.IGNORECASE):
            found[name] = int(match[1])
            text = text.replace(match[0], "")
    for key, value in _PAIR.findall(text):
        found |= setting(key, value) or {}
    return found


def setting(key: str, text: str) -> dict[str, Any] | None:
    """A setting with its value, such as {"lora.r": 16}; None if the key is no setting, or the value is not of its type."""
    name = SETTINGS.get(re.sub(r"\s+", "_", key.strip("` ").lower()))
    text = text.strip("` ")
    if name is None:
        return None
    if name == "affine" and (source := re.search(r"loaded from `?([\w./-]+)", text)):
        return {name: source[1]}
    if key.lower().startswith("kl divergence"):
        return {name: "kl"} if text.lower().startswith("true") else None
    kind = TYPES.get(name)
    if any(get_origin(option) is list for option in options(kind)) and not _is_text(kind):
        found = re.match(r"\[[\d,\s]+\]", text)
        with contextlib.suppress(ValueError):  # [1, , 2]
            return {name: json.loads(found[0])} if found else None
        return None
    if _is_text(kind):
        return {name: text.lower() if name == "optimizer" else text} if re.fullmatch(r"[\w./:@-]+", text) else None
    found = re.match(rf"({NUMBER}|true|false)(?=$|\s*\()", text, re.IGNORECASE)
    return {name: _number(found[1])} if found else None


def _is_text(kind: Any) -> bool:
    """Whether a setting of this type may be a text: a string, or one of several words."""
    return kind is str or any(type(part) is str or _is_text(part) for part in get_args(kind))


def _number(text: str) -> Any:
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)


def spaced(name: str) -> str:
    """A name in lower case, with a space between its words."""
    return re.sub(r"[\s_]+", " ", name.strip().lower())


def column(header: str, tasks: dict[str, str]) -> Column:
    """What a header means. `tasks` are the user's own names of tasks, which come before the usual ones."""
    clean = plain(header)
    percent = bool(re.search(r"\(\s*%\s*\)|%", clean))
    clean = re.sub(r"\(\s*(?:↓|↑|%|deprecated|lower is better|higher is better)\s*\)|[↓↑%]", "", clean, flags=re.IGNORECASE)
    name = spaced(clean)
    known = TASKS | tasks

    def made(role: str, what: str = "", step: int | None = None) -> Column:
        return Column(header, role, what, step, percent)

    for role, pattern in ROLES.items():
        if re.fullmatch(pattern, name):
            return made(role)
    if name in known:
        return made("task", known[name])
    if name.endswith("loss"):
        return made("loss", name.replace(" ", "_"))
    for role, pattern in AT_STEP:
        if at := re.fullmatch(pattern, name):
            task, step = at["task"], at["step"]
            if task is not None and task not in known:
                return made("other")
            return made(role, known.get(task or "", ""), int(step) if step else 0 if role == "point" else None)
    named = SETTINGS.get(name.replace(" ", "_"))
    return made("setting", named) if named else made("other")


def kind_of(columns: list[Column]) -> str | None:
    """The kind of run that the rows of a table describe; None if the table is not about runs."""
    roles = {col.role for col in columns}
    if not roles & {"task", "loss", "point", "final"}:
        return None
    if "checkpoint" in roles:
        return "checkpoints"
    if roles & {"point", "final"}:
        return "tamper"
    if "loss" in roles or any(col.role == "setting" for col in columns):
        return "unlearn"
    return "evaluate" if roles & {"model", "label", "job"} else None


def plain(cell: str) -> str:
    """A cell's text without emphasis, addresses of links, HTML and marks of footnotes."""
    return _MARK.sub("", _shown(cell)).strip()


def marks(cell: str) -> list[str]:
    """The marks of footnotes in a cell."""
    return [mark[1] or mark[0] for mark in _MARK.finditer(_shown(cell))]


def _shown(cell: str) -> str:
    if not _MARKUP.search(cell) or len(cell) > LONGEST_CELL:
        return cell
    tokens: list[Token] = []
    _MARKDOWN.inline.parse(cell, _MARKDOWN, {}, tokens)
    return "".join(" " if token.type == "html_inline" else token.content for token in tokens)
