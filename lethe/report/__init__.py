"""Reports from runs: `report` writes tables (markdown), charts (SVG and PNG) and one self-contained web page.

    runs -> study.py (joined by the hashes they record) -> tables.py, charts.py -> page.py

Everything is made in memory first, so that a refusal leaves nothing behind, and each file is then replaced whole.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lethe.errors import LetheError
from lethe.ledger import refuse_run_folder

if TYPE_CHECKING:
    from lethe.config import ReportConfig

PNG_SCALE = 2.0
WRITTEN = ".report.json"
"""Names the files of a report, so that the next one replaces these and no others."""


def report(config: ReportConfig) -> dict[str, Path]:
    """Write tables.md, index.html and charts/ into `config.out`; return their paths as `tables`, `page`, `charts`.

    A report that is already there is replaced; other files stay.

    Raises:
        LetheError: there are no runs, numbers of one task were measured in different ways, or `out` is a run, a file, holds
            a page or tables that are no report's, or cannot be written; raised before anything is written, but for the last.
    """
    from lethe.report.study import Study
    from lethe.report.tables import all_tables

    refuse_run_folder(config.out)
    out = Path(config.out)
    before = _files_of(out)
    study = Study.load(config.runs)
    tables = all_tables(study)

    import vl_convert

    from lethe.report import page
    from lethe.report.charts import all_charts

    specs = {name: (caption, chart.to_dict()) for name, (caption, chart) in all_charts(study).items()}
    svgs = {name: vl_convert.vegalite_to_svg(spec) for name, (_, spec) in specs.items()}
    files: dict[str, bytes] = {}
    for name in specs:
        files[f"charts/{name}.svg"] = svgs[name].encode()
        files[f"charts/{name}.png"] = vl_convert.svg_to_png(svgs[name], scale=PNG_SCALE)
    summary = "\n\n".join([f"# {config.title}", *page.headline(study)])
    files["tables.md"] = (summary + "\n\n" + "\n".join(table.markdown() for table in tables)).encode()
    charts = {name: (caption, spec, svgs[name]) for name, (caption, spec) in specs.items()}
    files["index.html"] = page.render(study, config.title, tables, charts).encode()
    _write(out, files, before)
    return {"tables": out / "tables.md", "page": out / "index.html", "charts": out / "charts"}


def _files_of(out: Path) -> list[str]:
    """The files that the last report in a folder has written there.

    Raises:
        LetheError: there is a page, or tables, that no report has written.
    """
    try:
        return json.loads((out / WRITTEN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        for name in ("index.html", "tables.md"):
            if (out / name).exists():
                why = f"out: '{out}' holds a file {name} that no report has written; choose another folder"
                raise LetheError(why) from None
        return []
    except (OSError, ValueError) as error:
        raise LetheError(f"out: '{out / WRITTEN}' cannot be read ({error}); choose another folder, or remove it") from error


def _write(out: Path, files: dict[str, bytes], before: list[str]) -> None:
    """Replace each file whole, and remove charts of an earlier report that this one has not."""
    every, own = (json.dumps(sorted(names)).encode() for names in ({*files, *before}, files))
    try:
        (out / "charts").mkdir(parents=True, exist_ok=True)
        for name, content in [(WRITTEN, every), *files.items(), (WRITTEN, own)]:  # first: one that is cut off is a report, too
            path = out / name
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            temporary.write_bytes(content)
            temporary.replace(path)
    except OSError as error:
        raise LetheError(f"out: cannot write to '{out}' ({error.strerror}); choose another folder") from error
    for old in set(before) - set(files):
        (out / old).unlink(missing_ok=True)
