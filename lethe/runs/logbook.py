"""Reading an experiment log kept by hand (markdown): its tables, each with the settings stated above it, and its prose.

    text -> read(): tables, with what their headers mean, and prose        setting(), phrases(): settings in words

The words that are understood stand below. What is stated nearer to a table wins over what is stated further away. What the
document states before its first section is about unlearning, not about attacks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

from lethe import config as c
from lethe.config.checks import fits, options, refuse_unusable, types_of
from lethe.errors import LetheError, printable
from lethe.files import yaml_of
from lethe.methods.method import every

KNOWN = ("wmdp", "wmdp_bio", "wmdp_bio_robust", "wmdp_bio_cloze", "mmlu", "mmlu_stem", *c.LAB_TASKS)
"""`wmdp` is a task of its own: the bare name does not say which of the others is meant."""
TASKS = {task: task for task in KNOWN} | {"wmdp_robust": "wmdp_bio_robust", "wmdp_cloze": "wmdp_bio_cloze"}
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
}
"""Field of a run's settings or plan, by the log's word for it."""
_COUNT = r"(?<![\d.,])(\d{1,12}+)"
PHRASES = {
    rf"{_COUNT} per device": "per_device_train_batch_size",
    r"grad(?:ient)?[ _]accumulation(?: steps)? (\d{1,12})": "gradient_accumulation_steps",
    r"effective batch(?: size)?(?: of)? (\d{1,12})": "effective_batch",
    rf"{_COUNT} (?:\w+ )?(?:examples|documents)": "num_train_examples",
    r"eval(?:uated?)? every (\d{1,12})": "eval.every",
    rf"{_COUNT} steps": "steps",
    rf"{_COUNT} (?:optimizer )?updates": "updates",
    rf"{_COUNT} forward passes": "forward_passes",
    rf"{_COUNT} ?ep(?:ochs?)?\b": "epochs",
}
COLUMNS = (
    ("job", r"(?:slurm_)?job(?:_?id)?"),
    ("checkpoint", r"checkpoint|revision"),
    ("status", r"status"),
    ("notes", r"notes?|comments?|remarks?"),
    ("model", r"model"),
    ("label", r"tamper_optimizer|attack|run|name"),
    ("loss", r".*loss"),
    ("point", r"start(?:ing)?_(?P<task>.+)"),
    ("point", r"step_(?P<step>\d{1,12})(?:_(?P<task>.+))?"),
    ("point", r"after_(?P<step>\d{1,12})_(?:steps?|updates)(?:_(?P<task>.+))?"),
    ("final", r"final(?:_(?P<task>[^(]+?))?(?:_\((?:step_)?(?P<step>\d{1,12})(?:_steps?|_updates)?\))?"),
    ("task", r"(?P<task>.+)"),
)
"""What headers mean. `point` and `final` are results during and after an attack: `Step 500 WMDP`, `Final (110 steps)`."""
NUMBER = r"[-+]?\d{1,30}(?:\.\d{1,30})?(?:e[-+]?\d{1,2})?"
"""A finite number."""
LONGEST_LINE = 4000
"""Characters. Some patterns take time in proportion to the square of a line's length."""
_PAIR = re.compile(r"\b([A-Za-z_]\w*)\s*=\s*([^\s,;()]+)")
_STATED = re.compile(r"([A-Za-z][\w ]*?) ?: (.+)")
_SETTINGS_LINE = re.compile(r"\s*(?:[\w ]*\b(?:settings?|config(?:uration)?)\b|goal\b)", re.IGNORECASE)
_STARTING = re.compile(rf"start(?:ing)? ([A-Za-z][\w ]*?) ?: ?(~? ?{NUMBER} ?%?)", re.IGNORECASE)
_NOTE = re.compile(r"(?:\\(\*+)|([†‡§])|\[\^(\w+)\]:)\s*(.+)")
_MARK = re.compile(r"\*+|[†‡§]|\[\^(\w+)\]")
_MARKDOWN = MarkdownIt("commonmark").enable("table").disable("reference")  # [^1]: is a note


@dataclass
class Section:
    """A heading, and the settings and starting values that the text below it has stated so far."""

    level: int
    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    starting: dict[str, str] = field(default_factory=dict)


@dataclass
class Column:
    """What a header means: its role, the setting or task that it names, the step, and the log's word for the task."""

    header: str
    role: str
    name: str = ""
    step: int | None = None
    percent: bool = False
    word: str = ""


@dataclass
class LogTable:
    """A table of the log; without rows if it only looks like one. `rows` are (line number, cells)."""

    line: int
    columns: list[Column]
    rows: list[tuple[int, list[str]]]
    kind: str | None
    """The kind of run that its rows describe; None if it is not about runs."""
    titles: list[str]
    """The headings above it; without the document's title, if there are others."""
    section: str
    """The section within which numbers of the prose are compared with its cells."""
    settings: dict[str, Any]
    starting: dict[str, str]
    """Values at step 0, by the log's name for the task."""
    misfits: list[tuple[int, str, str]] = field(default_factory=list)
    """Rows that have not one cell for each column: line number, text, why."""
    notes: dict[str, str] = field(default_factory=dict)
    """Footnotes by their mark."""

    @property
    def headers(self) -> list[str]:
        return [column.header for column in self.columns]

    @property
    def group(self) -> str:
        return " › ".join(filter(None, self.titles))


Prose = list[tuple[int, str, str]]
"""Line number, title of the section, text."""


def read(text: str, tasks: dict[str, str]) -> tuple[list[LogTable], Prose]:
    """The tables of a log, and the lines of its prose that state no setting. `tasks` are the user's own names of tasks.

    The markdown parser decides what is a table, a heading or a list, so code, comments and HTML are not read.

    Raises:
        LetheError: a line is too long.
    """
    lines = text.expandtabs(4).split("\n")
    for number, line in enumerate(lines, start=1):
        if len(line) > LONGEST_LINE:
            raise LetheError(f"file: line {number} has {len(line)} characters; expected {LONGEST_LINE} at most")
    reader = _Reader([printable(line) for line in lines], TASKS | tasks)
    reader.walk(SyntaxTreeNode(_MARKDOWN.parse("\n".join(reader.lines))), [Section(0, "")])
    return reader.tables, reader.prose


class _Reader:
    """What has been read so far."""

    def __init__(self, lines: list[str], tasks: dict[str, str]) -> None:
        self.lines, self.tasks = lines, tasks
        self.tables: list[LogTable] = []
        self.prose: Prose = []

    def walk(self, node: SyntaxTreeNode, sections: list[Section], listed: bool = False) -> None:
        """Read a part of the document below the headings `sections`. `listed`: it is a list of settings."""
        lists_settings = False
        for child in node.children:
            line = _line(child)
            if child.type in {"heading", "table"}:
                lists_settings = False
            if child.type == "heading":
                level, title = int(child.tag[1]), " ".join(child.children[0].content.split())
                sections[:] = [s for s in sections if s.level < level] + [Section(level, title, phrases(title))]
                self.prose.append((line, part_of(sections), title))
            elif child.type == "table":
                rows = [part for part in child.walk() if part.type == "tr"]
                cells = [(_line(row), [cell.children[0].content for cell in row.children]) for row in rows]
                self._add_table(line, sections, cells[0][1], cells[1:])
            elif child.type == "paragraph":
                texts = [" ".join(part.split()) for part in child.children[0].content.split("\n")]
                if texts[0].startswith("|"):
                    self._add_table(line, sections, texts[0].strip("| ").split(" | "), [])
                for number, text in enumerate(texts, start=line):
                    lists_settings = _SETTINGS_LINE.match(plain(text)) is not None
                    self._read_line(number, text, sections, listed)
            else:  # a list, a quotation or a part of one: headings inside it end with it
                self.walk(child, list(sections), listed or lists_settings)

    def _add_table(self, line: int, sections: list[Section], headers: list[str], rows: list[tuple[int, list[str]]]) -> None:
        columns = [column(header, self.tasks) for header in headers]
        kind = _kind(columns)
        own = [s for s in sections if s.level > 1] or sections
        settings = {name: value for s in (own if kind == "tamper" else sections) for name, value in s.settings.items()}
        starting = {name: value for s in sections for name, value in s.starting.items()}
        titles = [s.title for s in own]
        table = LogTable(line, columns, rows, kind, titles, part_of(sections), settings, starting)
        for number, _ in rows:
            source = self.lines[number - 1].lstrip("> ").rstrip()
            cells = len(re.split(r"(?<!\\)\|", source.removeprefix("|").removesuffix("|")))
            if cells != len(columns):
                table.misfits.append((number, source, f"{cells} cells under {len(columns)} headers"))
        self.tables.append(table)

    def _read_line(self, number: int, line: str, sections: list[Section], listed: bool) -> None:
        if self.tables and (note := _NOTE.match(line)):
            self.tables[-1].notes[note[1] or note[2] or note[3]] = note[4]
        if not _take_settings(plain(line), sections[-1], listed):
            self.prose.append((number, part_of(sections), line))


def _line(node: SyntaxTreeNode) -> int:
    return node.map[0] + 1 if node.map else 0


def part_of(sections: list[Section]) -> str:
    """The title of the section of the second level, within which numbers of the prose are compared with cells."""
    return next((s.title for s in sections if s.level == 2), sections[-1].title)


def _take_settings(line: str, section: Section, listed: bool) -> bool:
    """Add the settings that a line states to `section`; whether it states any as `name: value`."""
    starting = {joined(name): value for name, value in _STARTING.findall(line)}
    section.starting |= starting
    stated = None if starting else _STATED.match(line)
    if stated:
        found = setting(stated[1], stated[2])
        if found is None and listed:
            found = {stated[1]: stated[2]}  # no setting of Lethe: imported as text
        if found is not None:
            section.settings |= found | phrases(stated[2])
            return True
    if _SETTINGS_LINE.match(line):
        for group in re.findall(r"\([^()]*\)", line):
            section.settings |= phrases(group)
    return bool(starting)


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
    if key.lower().startswith("kl divergence") and text.lower().startswith("true"):
        return {"retain_loss": "kl"}
    name = SETTINGS.get(joined(key))
    if name == "affine" and (source := re.search(r"loaded from ([\w./-]+)", text)):
        return {name: source[1]}
    value = re.fullmatch(r"(\[[^\]]*\]|[^\s()]+)\s*(?:\(.*)?", text)  # a remark may follow in brackets
    if name is None or value is None:
        return None
    kind = TYPES.get(name, float)
    if any(option is str or get_origin(option) is Literal for option in options(kind)):
        return {name: value[1].lower() if name == "optimizer" else value[1]}
    try:
        read = yaml_of(value[1])
        refuse_unusable(name, read)
    except LetheError:
        return None
    return {name: read} if fits(read, kind) else None


def joined(name: str) -> str:
    """A name in lower case, with an underscore between its words."""
    return re.sub(r"[\s_]+", "_", name.strip().lower())


def column(header: str, tasks: dict[str, str]) -> Column:
    """What a header means. `tasks` are all tasks by the log's name for them."""
    clean = plain(header)
    percent = "%" in clean
    clean = re.sub(r"\(\s*(?:↓|↑|%|deprecated|lower is better|higher is better)\s*\)|[↓↑%]", "", clean, flags=re.IGNORECASE)
    name = joined(clean)
    for role, pattern in COLUMNS:
        if match := re.fullmatch(pattern, name):
            word, step = (match.groupdict().get(what) for what in ("task", "step"))
            if word is None or word in tasks:
                what = name if role == "loss" else tasks.get(word or "", "")
                return Column(header, role, what, int(step) if step else 0 if role == "point" else None, percent, word or "")
    return Column(header, "setting" if name in SETTINGS else "other", SETTINGS.get(name, ""))


def _kind(columns: list[Column]) -> str | None:
    roles = {col.role for col in columns}
    if not roles & {"task", "loss", "point", "final"}:
        return None
    if "checkpoint" in roles:
        return "checkpoints"
    if roles & {"point", "final"}:
        return "tamper"
    if roles & {"loss", "setting"}:
        return "unlearn"
    return "evaluate" if roles & {"model", "label", "job"} else None


def plain(cell: str) -> str:
    """A cell's text without emphasis, addresses of links, HTML and marks of footnotes."""
    return _MARK.sub("", _shown(cell)).strip()


def marks(cell: str) -> list[str]:
    """The marks of footnotes in a cell."""
    return [mark[1] or mark[0] for mark in _MARK.finditer(_shown(cell))]


def _shown(cell: str) -> str:
    parts = _MARKDOWN.parseInline(cell)[0].children or []
    return "".join(" " if part.type == "html_inline" else part.content for part in parts)
