"""What a hand-kept experiment log (markdown) says: tables, each under its headings, with the settings stated above it.

    text -> read(): tables and prose; column(): what a header means; setting(), phrases(): settings in words

The words that are understood stand right below. What is stated nearer to a table goes before what is stated further off;
what the document says before its first section is about unlearning, and not for attacks.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any

from lethe import config as c

TASKS = {
    "wmdp": "wmdp",  # which of them a log means by the bare name is not told
    "wmdp bio": "wmdp_bio",
    "wmdp robust": "wmdp_bio_robust",
    "wmdp bio robust": "wmdp_bio_robust",
    "wmdp cloze": "wmdp_bio_cloze",
    "wmdp bio cloze": "wmdp_bio_cloze",
    "mmlu": "mmlu",
    "mmlu stem": "mmlu_stem",
} | {task.replace("_", " "): task for task in c.LAB_TASKS}
SETTINGS = {
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
} | {f.name: f.name for kind in (c.UnlearnConfig, c.TamperConfig) for f in dataclasses.fields(kind)}
TEXTS = {"optimizer", "schedule", "affine", "retain_loss", "forget_loss", "dtype", "model", "source", "forget", "retain"}
TEXTS |= {"cb_scale"}
NOT_SETTINGS = {"name", "out", "eval", "lora", "time_limit"}
PHRASES = {
    r"(\d+) per device": "per_device_train_batch_size",
    r"grad(?:ient)?[ _]accumulation(?: steps)? (\d+)": "gradient_accumulation_steps",
    r"effective batch(?: size)?(?: of)? (\d+)": "effective_batch",
    r"(\d+) (?:\w+ )?(?:examples|documents)": "num_train_examples",
    r"eval(?:uated?)? every (\d+)": "eval.every",
    r"(\d+) steps": "steps",
    r"(\d+) (?:optimizer )?updates": "updates",
    r"(\d+) forward passes": "forward_passes",
    r"(\d+) ?ep(?:ochs?)?\b": "epochs",
}
NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
_PAIR = re.compile(r"`?([A-Za-z_]\w*)`?\s*=\s*([^\s,;()]+)")
_STATED = re.compile(r"^\s*(?:[-+*]\s+)?(?:\*\*)?`?([A-Za-z][\w ]*?)`?(?:\*\*)?\s*:(?:\*\*)?\s+(.+?)\s*$")
_SETTINGS_LINE = re.compile(r"^\s*\**\s*(?:[\w ]*\b(?:settings?|config(?:uration)?)\b|goal\b)", re.IGNORECASE)
_STARTING = re.compile(rf"start(?:ing)? ([A-Za-z][\w ]*?)\s*:\s*(~?\s*{NUMBER}\s*%?)", re.IGNORECASE)
_RULE = re.compile(r"\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*")


@dataclass
class Section:
    """A heading, and what the text below it states so far."""

    level: int
    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    starting: dict[str, str] = field(default_factory=dict)


@dataclass
class LogTable:
    """A table as it stands in the log. `rows` are (line number, cells); `notes` are footnotes by their mark."""

    line: int
    sections: list[Section]
    columns: list[str]
    rows: list[tuple[int, list[str]]]
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """The headings above the table, without the document's own title where there are others."""
        titles = [s.title for s in self.sections if s.level > 1] or [s.title for s in self.sections]
        return " › ".join(filter(None, titles))

    @property
    def starting(self) -> dict[str, str]:
        """Values at step 0, by the log's name of the task."""
        return {name: value for section in self.sections for name, value in section.starting.items()}

    def settings(self, own: bool) -> dict[str, Any]:
        """What holds for the rows; with `own`, without what the document as a whole states (about unlearning)."""
        chosen = [s for s in self.sections if s.level > 1] if own else self.sections
        return {name: value for s in chosen or self.sections for name, value in s.settings.items()}


@dataclass
class Column:
    """What a header means: its role, the field or task it names, the step it is about."""

    header: str
    role: str
    name: str = ""
    step: int | None = None
    percent: bool = False
    deprecated: bool = False


def read(text: str) -> tuple[list[LogTable], list[tuple[int, str, str]]]:
    """The tables of a log, and its prose: (line number, section, what is left of the line after settings are taken)."""
    lines = text.splitlines()
    sections = [Section(0, "")]
    tables: list[LogTable] = []
    prose: list[tuple[int, str, str]] = []
    listing = fenced = False
    i = 0
    while i < len(lines):
        line = lines[i]
        i += 1
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if fenced or not line.strip():
            continue
        if "|" in line and i < len(lines) and "|" in lines[i] and _RULE.fullmatch(lines[i]):
            table = LogTable(i, [dataclasses.replace(s, settings=dict(s.settings)) for s in sections], _cells(line), [])
            i += 1
            while i < len(lines) and "|" in lines[i]:
                table.rows.append((i + 1, _cells(lines[i])))
                i += 1
            tables.append(table)
            listing = False
            continue
        if heading := re.fullmatch(r"(#+)\s+(.*?)\s*#*\s*", line):
            level = len(heading[1])
            sections = [s for s in sections if s.level < level] + [Section(level, heading[2], phrases(heading[2]))]
            listing = False
        elif tables and (note := re.match(r"\s*(?:\\(\*+)|([†‡§])|\[\^(\w+)\]:)\s*(.+)", line)):
            tables[-1].notes[note[1] or note[2] or note[3]] = note[4]
        is_bullet = re.match(r"\s*[-+*]\s", line) is not None
        listing = (listing and is_bullet) or (not heading and _SETTINGS_LINE.match(line) is not None and not is_bullet)
        left = line if heading else _take_settings(line, sections[-1], listing and is_bullet)
        part = next((s.title for s in sections if s.level == 2), sections[-1].title)
        prose.append((i, part, left))
    return tables, prose


def _cells(line: str) -> list[str]:
    parts = re.split(r"(?<!\\)\|", line.strip().removeprefix("|"))
    if parts and not parts[-1].strip() and line.rstrip().endswith("|"):
        parts.pop()
    return [part.strip().replace("\\|", "|") for part in parts]


def _take_settings(line: str, section: Section, listed: bool) -> str:
    """Note the settings that a line states; what is left of the line. `listed`: it is a bullet of a list of settings."""
    if starting := _STARTING.findall(line):
        section.starting |= {spaced(name): value for name, value in starting}
        return _STARTING.sub("", line)
    if stated := _STATED.match(line):
        found = setting(stated[1], stated[2])
        if found is None and listed:
            found = {stated[1].strip("` "): stated[2]}  # no setting of Lethe's: kept as text
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
    """A setting with its value, such as {"lora.r": 16}; None where the key is no setting or the value cannot be one."""
    name = SETTINGS.get(re.sub(r"\s+", "_", key.strip("` ").lower()))
    text = text.strip("` ")
    if name is None or name in NOT_SETTINGS:
        return None
    if name == "affine" and (source := re.search(r"loaded from `?([\w./-]+)", text)):
        return {name: source[1]}
    if key.lower().startswith("kl divergence"):
        return {name: "kl"} if text.lower().startswith("true") else None
    if name == "layers":
        found = re.match(r"\[[\d,\s]+\]", text)
        return {name: json.loads(found[0])} if found else None
    if name in TEXTS:
        return {name: text.lower() if name == "optimizer" else text} if re.fullmatch(r"[\w./:@-]+", text) else None
    found = re.match(rf"({NUMBER}|true|false)(?=$|\s*\()", text, re.IGNORECASE)
    return {name: _number(found[1])} if found else None


def _number(text: str) -> Any:
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)


def spaced(name: str) -> str:
    """A name in small letters, its words a space apart."""
    return re.sub(r"[\s_]+", " ", name.strip().lower())


def column(header: str, tasks: dict[str, str]) -> Column:
    """What a header means. `tasks`: the user's own names of tasks, before the usual ones."""
    clean = re.sub(r"[*`]", "", header)
    deprecated = "deprecated" in clean.lower()
    percent = bool(re.search(r"\(\s*%\s*\)|%", clean))
    clean = re.sub(r"\(\s*(?:↓|↑|%|deprecated|lower is better|higher is better)\s*\)|[↓↑%]", "", clean, flags=re.IGNORECASE)
    name = spaced(clean)
    known = TASKS | tasks

    def made(role: str, what: str = "", step: int | None = None) -> Column:
        return Column(header, role, what, step, percent, deprecated)

    for role, pattern in {
        "job": r"(?:slurm )?job(?: ?id)?",
        "checkpoint": r"checkpoint|revision",
        "status": r"status",
        "notes": r"notes?|comments?|remarks?",
        "model": r"model",
        "label": r"tamper optimizer|attack|run|name",
    }.items():
        if re.fullmatch(pattern, name):
            return made(role)
    if name in known:
        return made("task", known[name])
    if name.endswith("loss"):
        return made("loss", name.replace(" ", "_"))
    if start := re.fullmatch(r"(?:starting|start) (.+)", name):
        return made("point", known.get(start[1], ""), 0) if start[1] in known else made("other")
    if at := re.fullmatch(r"(?:step (\d+)|after (\d+) (?:steps?|updates))(?: (.+))?", name):
        ok = at[3] is None or at[3] in known
        return made("point", known.get(at[3] or "", ""), int(at[1] or at[2])) if ok else made("other")
    if final := re.fullmatch(r"final(?: ([^(]+?))?(?: \((?:step )?(\d+)(?: steps?| updates)?\))?", name):
        ok = final[1] is None or final[1] in known
        return made("final", known.get(final[1] or "", ""), int(final[2]) if final[2] else None) if ok else made("other")
    named = SETTINGS.get(name.replace(" ", "_"))
    return made("setting", named) if named and named not in NOT_SETTINGS else made("other")


def kind_of(columns: list[Column]) -> str | None:
    """The kind of run that a table's rows are; None when they are none."""
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
    """A cell's text without emphasis, addresses of links and marks of footnotes."""
    cell = re.sub(r"\[([^\]^]+)\]\([^()]*\)", r"\1", cell)
    text = re.sub(r"\*\*(.+?)\*\*|__(.+?)__|`(.+?)`", lambda m: m[1] or m[2] or m[3], cell)
    return re.sub(r"\\?\*+|[†‡§]|\[\^\w+\]", "", text).strip()


def marks(cell: str) -> list[str]:
    """The marks of footnotes in a cell."""
    return re.findall(r"\*+|[†‡§]|(?<=\[\^)\w+(?=\])", re.sub(r"\*\*(.+?)\*\*", r"\1", cell))
