"""Reports from runs: `report` writes tables (markdown), charts (SVG and PNG) and one self-contained web page.

    runs -> results/study.py joins them -> tables.py, charts.py -> page.py -> files

A report is made in memory before anything is written, so a refusal leaves nothing behind. `.report.json` holds the hash of
each file, so the next report replaces or removes only files that a report has written and nobody has changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lethe.errors import LetheError
from lethe.files import UnreadableError, json_of, refuse_run_folder, text_of, write_atomically
from lethe.report.rendering import escaped
from lethe.results.format import shown

if TYPE_CHECKING:
    from lethe.config import ReportConfig
    from lethe.progress import Advance
    from lethe.results.study import Study

PNG_SCALE = 2.0
WRITTEN = ".report.json"
"""Holds the SHA-256 of each file of a report; two hashes of each file while a report is being written."""
MAIN = ("index.html", "tables.md")
_OURS = re.compile(r"index\.html|tables\.md|charts/[\w-]+\.(svg|png)")
logger = logging.getLogger(__name__)
Hashes = dict[str, list[str]]


def report(config: ReportConfig) -> dict[str, Path]:
    """Write tables.md, index.html and charts/ into `config.out`; return their paths as `tables`, `page`, `charts`.

    An earlier report in `out` is replaced. Other files stay, and so do its charts that somebody has changed.

    Raises:
        LetheError: there are no runs; or `out` is a run, is a file, holds a page or tables that no report has written or
            that somebody has changed, or cannot be written.
    """
    from lethe.progress import bar
    from lethe.results.study import Study

    before = check_out(config.out)
    out = Path(config.out)
    with bar("Report", 4, "parts") as advance:
        study = Study.load(config.runs)
        advance(1, f"{len(study.runs) + len(study.imported)} runs")
        files = _made(study, shown(config.title), advance)
    _write(out, files, before)
    return {"tables": out / "tables.md", "page": out / "index.html", "charts": out / "charts"}


def check_out(out: str | Path) -> Hashes:
    """The hashes of what the last report wrote into a folder.

    Raises:
        LetheError: the folder is a run or a file, or holds a page or tables that no report has written.
    """
    refuse_run_folder(out)
    out = Path(out)
    before = _written(out)
    for name in MAIN:
        if os.path.lexists(out / name) and not _is_ours(out, name, before):
            why = "has changed since a report wrote it" if name in before else "this version of Lethe has not written"
            raise LetheError(f"out: '{out}' holds a file {name} that {why}; move it away, or choose another folder")
    charts = out / "charts"
    if charts.is_symlink() or (charts.exists() and not charts.is_dir()):
        raise LetheError(f"out: '{charts}' is a link or a file, where a report needs a folder of its own; move it away")
    return before


def _made(study: Study, title: str, advance: Advance) -> dict[str, bytes]:
    """The files of a report, by name."""
    from lethe.report.tables import all_tables

    tables = all_tables(study)
    advance(1, f"{len(tables)} tables")

    import vl_convert

    from lethe.report.charts import all_charts
    from lethe.report.headline import headline
    from lethe.report.page import render

    specs = {name: (caption, chart.to_dict(validate=False)) for name, (caption, chart) in all_charts(study).items()}
    svgs = {name: vl_convert.vegalite_to_svg(spec) for name, (_, spec) in specs.items()}
    files: dict[str, bytes] = {}
    for name in specs:
        files[f"charts/{name}.svg"] = svgs[name].encode()
        files[f"charts/{name}.png"] = vl_convert.svg_to_png(svgs[name], scale=PNG_SCALE)
    advance(1, f"{len(specs)} charts")
    summary = "\n\n".join([f"# {escaped(title)}", *map(escaped, headline(study))])
    files["tables.md"] = (summary + "\n\n" + "\n".join(table.markdown() for table in tables)).encode()
    charts = {name: (caption, spec, svgs[name]) for name, (caption, spec) in specs.items()}
    files["index.html"] = render(study, title, tables, charts).encode()
    advance(1, "page")
    return files


def _written(out: Path) -> Hashes:
    """The hashes in `.report.json` of files that a report may write; none if it is damaged. It may be somebody else's file."""
    try:
        files = json_of(text_of(out / WRITTEN))["files"].items() if (out / WRITTEN).is_file() else ()
    except (UnreadableError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s: damaged (%s); ignored", out / WRITTEN, error)
        return {}
    return {name: hashes for name, hashes in files if _OURS.fullmatch(name) and isinstance(hashes, list)}


def _is_ours(out: Path, name: str, before: Hashes) -> bool:
    """Whether a file is there as a report has written it: not a link, not in a linked folder, and with a known hash."""
    path = out / name
    linked = path.is_symlink() or (path.parent != out and path.parent.is_symlink())
    if linked or not path.is_file():
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() in before.get(name, [])


def _write(out: Path, files: dict[str, bytes], before: Hashes) -> None:
    """Replace each file whole, and remove charts of the earlier report that this one does not have."""
    own = {name: [hashlib.sha256(content).hexdigest()] for name, content in files.items()}
    left = [n for n in {**files, **before} if n not in MAIN and os.path.lexists(out / n) and not _is_ours(out, n, before)]
    for name in left:
        logger.warning("%s has changed since a report wrote it; left alone", out / name)
    either = {name: [*own.get(name, []), *before.get(name, [])] for name in {**own, **before}}
    try:
        (out / "charts").mkdir(parents=True, exist_ok=True)
        write_atomically(out / WRITTEN, _listed(either))  # first, so that an interrupted report can be replaced too
        for name in set(files) - set(left):
            write_atomically(out / name, files[name])
        for name in set(before) - set(files) - set(left):
            (out / name).unlink(missing_ok=True)
        write_atomically(out / WRITTEN, _listed({name: hashes for name, hashes in own.items() if name not in left}))
    except OSError as error:
        raise LetheError(f"out: cannot write to '{out}' ({error.strerror}); choose another folder") from error


def _listed(files: Hashes) -> str:
    return json.dumps({"files": files}, indent=1)
