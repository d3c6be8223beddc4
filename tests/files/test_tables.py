"""Rows from tables, texts and folders: what stands in them comes out as rows, and what is wrong is named."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from twinmerge.errors import DataError, MissingExtraError
from twinmerge.files.rows import count_lines, open_rows, read_rows
from twinmerge.files.tables import RowFile

ROWS = [{"text": 'é, "quoted"\nand more', "label": "x"}, {"text": "b", "label": "y"}]


def write(path: Path) -> Path:
    """The rows in the form that the path's suffix names."""
    if path.suffix in (".csv", ".tsv"):
        cell = lambda value: '"' + value.replace('"', '""') + '"'  # noqa: E731
        lines = [["text", "label"], *([row["text"], row["label"]] for row in ROWS)]
        between = "," if path.suffix == ".csv" else "\t"
        path.write_text("".join(between.join(map(cell, line)) + "\r\n" for line in lines), encoding="utf-8", newline="")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.parquet", "rows.jsonl", "ROWS.CSV"])
def test_rows_are_those_of_the_file(tmp_path: Path, name: str) -> None:
    assert read_rows(write(tmp_path / name.lower()).rename(tmp_path / name), labelled=True) == ROWS


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.jsonl"])
def test_columns_may_be_named(tmp_path: Path, name: str) -> None:
    found = RowFile.parse(f"{write(tmp_path / name)}#text=label,text_pair=text")
    assert read_rows(found, labelled=False) == [{"text": r["label"], "text_pair": r["text"]} for r in ROWS]
    alone = RowFile.parse(f"{tmp_path / name}#label")
    assert [row["text"] for row in read_rows(alone, labelled=False)] == ["x", "y"]


def test_lines_of_a_text_are_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("\ufeffa b\n\n  c \r\n", encoding="utf-8")
    assert read_rows(tmp_path / "rows.txt", labelled=False) == [{"text": "a b"}, {"text": "  c "}]


def test_images_of_a_folder_are_rows_and_inner_folders_labels(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/1.jpg", "a.png", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert read_rows(tmp_path, labelled=False) == [
        {"image": str(tmp_path / "a.png")},
        {"image": str(tmp_path / "b/1.jpg"), "label": "b"},
        {"image": str(tmp_path / "b/2.PNG"), "label": "b"},
    ]


def test_images_in_a_parquet_file_become_data_uris(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": b"abc", "path": "a.png"}}, {"image": {"bytes": None, "path": "b.png"}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    first, second = (row["image"] for row in read_rows(tmp_path / "x.parquet", labelled=False))
    assert first == "data:image;base64,YWJj"
    assert second == str(tmp_path / "b.png")


def test_rows_may_be_longer_than_what_is_read_at_a_time(tmp_path: Path) -> None:
    long = "a b" * 50_000
    (tmp_path / "x.txt").write_text(f"{long}\nc\n")
    assert read_rows(tmp_path / "x.txt", labelled=False) == [{"text": long}, {"text": "c"}]


def test_empty_cells_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,text_pair\na,\nb,c\n")
    assert read_rows(tmp_path / "x.csv", labelled=False) == [{"text": "a"}, {"text": "b", "text_pair": "c"}]


def test_values_that_json_lacks_are_written_out(tmp_path: Path) -> None:
    import datetime

    day = datetime.date(2026, 11, 27)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a", "day": day}]), tmp_path / "x.parquet")
    assert read_rows(tmp_path / "x.parquet", labelled=False) == [{"text": "a", "day": "2026-11-27"}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", b"text\na,b\n", r"x.csv:1: the row has more cells than the header"),
        ("x.csv", b"text\n\xff\n", r"x.csv is no table in UTF-8"),
        ("x.txt", b"\xff\n", r"x.txt is no text in UTF-8"),
        ("x.parquet", b"PAR1", r"x.parquet is no parquet file"),
        ("x.csv", b"other\na\n", r"x.csv:1: the row lacks 'text'"),
        ("x.csv", b"text\n", r"x.csv holds no rows"),
        ("x.csv#neck", b"text\na\n", r"x.csv has no column 'neck'; its columns are text"),
        ("x.jsonl#neck", b'{"a": 1}\n', r"x.jsonl has no column 'neck'; its columns are a"),
        ("x.jsonl#neck", b"{\n", r"x.jsonl:1: not JSON"),
        ("x.jsonl#neck", b"[1]\n", r"x.jsonl:1: expected a JSON object, found \[1\]"),
        ("x.csv#text=", b"text\na\n", r"after # stands a column"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name.partition("#")[0]).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_rows(RowFile.parse(str(tmp_path / name)), labelled=False)


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for name in ("absent.csv#text", "absent.jsonl"):
        with pytest.raises(DataError, match=r"cannot read rows from .*absent"):
            read_rows(RowFile.parse(str(tmp_path / name)), labelled=False)


def test_name_may_hold_the_sign_of_a_column(tmp_path: Path) -> None:
    write(tmp_path / "a#b.jsonl")
    assert read_rows(RowFile.parse("a#b.jsonl", tmp_path), labelled=True) == ROWS


def test_lines_are_counted_where_they_are_rows(tmp_path: Path) -> None:
    assert count_lines(RowFile(write(tmp_path / "x.jsonl"))) == 2
    assert count_lines(RowFile(write(tmp_path / "x.csv"))) is None
    assert count_lines(RowFile.parse(f"{tmp_path}/x.jsonl#label")) is None


def test_bytes_are_the_same_every_time(tmp_path: Path) -> None:
    """By them an interrupted run is gone on with."""
    source = RowFile(write(tmp_path / "x.csv"))
    with open_rows(source) as first, open_rows(source) as second:
        assert first.read() == second.read() != b""


@pytest.mark.parametrize("words", ["hf://datasets/me/set/data/a.csv", "hf://datasets/me/set@v1/data/a.csv#label"])
def test_hub_datasets_are_fetched_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    asked: list[Any] = []

    def fetch(repo: str, file: str, **settings: Any) -> str:
        asked.append((repo, file, settings["repo_type"], settings["revision"]))
        return str(write(tmp_path / "a.csv"))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert len(read_rows(RowFile.parse(words), labelled=False)) == 2
    assert asked == [("me/set", "data/a.csv", "dataset", "v1" if "@" in words else None)]


def test_what_the_hub_does_not_give_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="hf://datasets/me/none/a.csv cannot be fetched"):
        RowFile.parse("hf://datasets/me/none/a.csv")


def test_parquet_without_pyarrow_names_the_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(MissingExtraError, match=r"pip install 'twinmerge\[parquet\]'"):
        read_rows(tmp_path / "x.parquet", labelled=False)
