"""What wrong inputs are made of, and how a list of them is tried: for `test_wrong_inputs.py`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
LONG = "x" * 100_000
HUGE = 10**400
DEEP = 5_000
DEEP_LISTS = "[" * 100_000 + "]" * 100_000
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 12\n"
NEVER: list[Any] = [
    *(2**64, HUGE, -HUGE, 1e308, -1e308, math.nan, math.inf, -math.inf, [math.nan], {1: "b"}),
    *("a\0b", "a\x1b[31mb", "half \ud800", LONG, ["a\0b"], [LONG], {"a": "b\0"}, {"a\0": "b"}),
]
"""Values that no setting may have."""
VALUES: list[Any] = [
    *(-1, 0, 1.5, 1e-320, None, True, [], [None], [[]], [1, "a"], [0, 0], [-1], [""], {}, {"a": 1}, {"a": None}, {"": ""}),
    *("", " ", "nonsense", "a\nb", "/".join(["y" * 300] * 3), "../..", "-", "{", ["x"] * 2),
]
"""Values that are wrong for many settings, and right for some."""
NO_TEXT: dict[str, bytes | None] = {
    "empty": b"",
    "binary": bytes(range(256)),
    "latin": b"caf\xe9: \xe9\n",
    "utf-16": "a: b\n".encode("utf-16"),
    "lfs": POINTER,
    "gzip": b"\x1f\x8b\x08\0",
    "not there": None,
}
"""What no file of text may be."""


@dataclasses.dataclass
class Case:
    """A wrong input: its words, and what a refusal may name it by. `must`: whether it cannot be right."""

    title: str
    words: list[str]
    names: list[str]
    must: bool = True


def check(tried: Callable[[list[str]], str | None], cases: Iterable[Case]) -> None:
    """Try all inputs, and report each that is not answered as it should be."""
    wrong = []
    for case in cases:
        try:
            line = tried(case.words)
        except (Exception, AssertionError) as error:
            wrong.append(f"{case.title}: {type(error).__name__}: {str(error)[:300]}")
            continue
        passed = line is None or "'nowhere" in line
        if passed and case.must:
            wrong.append(f"{case.title}: not refused")
        elif line is not None and not passed and not any(name in line for name in case.names):
            wrong.append(f"{case.title}: named by none of {case.names}: {line[:300]}")
    assert not wrong, f"{len(wrong)} inputs\n" + "\n".join(wrong)


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 120 else f"{text[:100]}… ({len(text)})"


def lines_of(name: str) -> list[str]:
    """What is wrong of a kind, one input a line."""
    return (DATA / "wrong" / f"{name}.txt").read_text().splitlines()


def file_of(path: Path, content: str | bytes | None) -> Path:
    """A file of this content; None: there is none."""
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def odd_places(folder: Path, suffix: str) -> Iterator[Path]:
    """Where no file is, though something has its name."""
    (folder / f"folder{suffix}").mkdir()
    (folder / f"broken{suffix}").symlink_to(folder / "gone")
    (folder / f"loop{suffix}").symlink_to(folder / f"loop{suffix}")
    (folder / f"plain{suffix}").write_text("x")
    yield from (folder / f"{name}{suffix}" for name in ("folder", "broken", "loop"))
    yield folder / f"plain{suffix}" / f"inner{suffix}"


def tables(folder: Path) -> Iterator[tuple[str, Path]]:
    """Parquet files with wrong columns, and damaged ones."""
    import pyarrow
    from pyarrow.parquet import write_table

    half = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
    )
    columns: dict[str, list[tuple[str, Any]]] = {
        "numbers": [("text", [1, 2])],
        "bytes": [("text", [b"a", b"b"])],
        "null among rows": [("text", ["a", None])],
        "lists": [("text", [["a"], ["b"]])],
        "another column": [("title", ["a", "b"])],
        "no rows": [("text", pyarrow.array([], pyarrow.string()))],
        "not UTF-8": [("text", half)],
        "a time out of range": [("other", pyarrow.array([2**62], pyarrow.timestamp("us")))],
        "a column twice": [("text", ["a"]), ("text", ["b"])],
    }
    for title, some in columns.items():
        path = folder / f"{title.replace(' ', '-')}.parquet"
        write_table(pyarrow.Table.from_arrays([pyarrow.array(c) for _, c in some], names=[name for name, _ in some]), path)
        yield title, path
    whole = (folder / "numbers.parquet").read_bytes()
    flipped = whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 0xFF]) + whole[len(whole) // 2 + 1 :]
    for title, content in {
        "cut": whole[:-20],
        "empty": b"",
        "garbage": b"PAR1" + bytes(range(200)) + b"PAR1",
        "flipped": flipped,
    }.items():
        yield title, file_of(folder / f"{title}.parquet", content)


def echoes(value: Any) -> list[str]:
    """How a refusal may show a value."""
    parts = value if isinstance(value, list | dict) else [value]
    return [f"'{part}'" for part in parts]
