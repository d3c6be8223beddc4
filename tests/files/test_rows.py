"""Rows of text: what the file holds comes back, and the first bad line is named."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinmerge.errors import DataError
from twinmerge.files.rows import characters_of, count_lines, iter_rows, read_rows, require_image
from twinmerge.files.tables import RowFile


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_rows_keep_their_order_and_their_other_fields(tmp_path: Path) -> None:
    rows = [{"text": "a", "text_pair": "b", "label": "x", "id": 7}, {"text": "", "label": "y", "tags": ["é", None]}]
    path = write(tmp_path / "rows.jsonl", *map(json.dumps, rows))
    assert read_rows(path, labelled=True) == rows


@given(st.lists(st.fixed_dictionaries({"text": st.text(st.characters(exclude_categories=["Cs"]))}), min_size=1))
def test_any_text_survives_the_file(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]) -> None:
    path = write(tmp_path_factory.mktemp("rows") / "rows.jsonl", *(json.dumps(row, ensure_ascii=False) for row in rows))
    assert read_rows(path, labelled=False) == rows


def test_integer_label_becomes_a_string(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"text": "a", "label": 3}')
    assert read_rows(path, labelled=True) == [{"text": "a", "label": "3"}]


def test_label_is_left_alone_where_none_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"text": "a", "label": 3.5}')
    assert read_rows(path, labelled=False) == [{"text": "a", "label": 3.5}]


def test_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}')
    assert [row["text"] for row in read_rows(path, labelled=False)] == ["a", "b"]


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n \r\n\t", "\n" * 5])
def test_blank_lines_at_the_end_are_nothing(tmp_path: Path, end: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\r\n{"text": "b"}' + end.encode())
    assert [row["text"] for row in read_rows(path, labelled=False)] == ["a", "b"]
    assert count_lines(RowFile(path)) == 2


@given(st.lists(st.sampled_from(["\n", " ", "\r\n", "x", "y\n"]), max_size=12))
def test_lines_are_counted_as_they_are_read(tmp_path_factory: pytest.TempPathFactory, pieces: list[str]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes("".join(pieces).encode())
    whole = "".join(pieces)
    expected = len(whole.rstrip().encode().splitlines()) if whole.strip() else 0
    assert count_lines(RowFile(path)) == expected


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters()), inner, max_size=3),
    max_leaves=8,
)


@given(fields=st.dictionaries(st.text(st.characters(), max_size=5), VALUES, max_size=4), ascii_only=st.booleans())
def test_a_row_that_is_read_can_be_written_again(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, object], ascii_only: bool
) -> None:
    """Whatever the file holds; an answer keeps the row's fields."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    raw = json.dumps({**fields, "text": "a"}, ensure_ascii=ascii_only)
    path.write_bytes(raw.encode(errors="surrogatepass"))
    refused = re.search(r"[\ud800-\udfff]|\\ud[89a-f]|NaN|Infinity", raw)
    try:
        [row] = read_rows(path, labelled=False)
    except DataError:
        if refused:
            return
        raise
    json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    assert row == json.loads(raw)


def test_odd_but_readable_fields_are_kept(tmp_path: Path) -> None:
    row = {"text": "a\u0000b\u2028", "x": [-0.0, 10**4000, "\U0001f600", {"": {}}], "deep": None}
    for _ in range(98):
        row["deep"] = [row["deep"]]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    assert read_rows(path, labelled=False) == [row]


def test_rows_come_one_by_one(tmp_path: Path) -> None:
    rows = iter_rows(write(tmp_path / "rows.jsonl", '{"text": "a"}', "broken"), labelled=False)
    assert next(rows) == {"text": "a"}
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not JSON"):
        next(rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{text: a}", r"rows\.jsonl:2: not JSON: Expecting property name"),
        ('{"text": "a", "score": NaN}', r"rows\.jsonl:2: not JSON: NaN is not a JSON number"),
        ('\n{"text": "b"}', r"rows\.jsonl:2: expected a JSON object, found an empty line; rows follow it"),
        ('\r\n \t\r\n{"text": "b"}', r"rows\.jsonl:2: expected a JSON object, found an empty line; rows follow it"),
        ('{"text": "a", "text": "b"}', r"rows\.jsonl:2: not JSON: key 'text' stands twice$"),
        ('{"text": "a", "more": [{"x": 1, "x": 1}]}', r"rows\.jsonl:2: not JSON: key 'x' stands twice$"),
        ('{"text": "a", "score": 1e999}', r"rows\.jsonl:2: not JSON: 1e999 is too large for a number$"),
        ('{"text": "a", "score": [-1e999]}', r"rows\.jsonl:2: not JSON: -1e999 is too large for a number$"),
        ('{"text": "a", "score": -Infinity}', r"rows\.jsonl:2: not JSON: -Infinity is not a JSON number$"),
        (
            '{"text": "a", "id": ' + "9" * 5000 + "}",
            r"rows\.jsonl:2: not JSON: an integer has too many digits$",
        ),
        ('{"text": ' + "[" * 10**5 + "]" * 10**5 + "}", r"rows\.jsonl:2: not JSON: it is nested too deeply$"),
        ('{"x": ' * 10**5 + "1" + "}" * 10**5, r"rows\.jsonl:2: not JSON: it is nested too deeply$"),
        ('{"text": "a", "x": ' + "[" * 101 + "]" * 101 + "}", r"rows\.jsonl:2: 'x' holds lists or .* 100 deep$"),
        ('{"text": "a", "x": {"y": ["\\ud800"]}}', r"rows\.jsonl:2: 'x' holds half a surrogate pair at character 0$"),
        ('{"text": "a", "\\udfff": 1}', r"rows\.jsonl:2: a key holds half a surrogate pair at character 0$"),
        ('{"text": "a", "x": {"a\\ud800": 1}}', r"rows\.jsonl:2: a key holds half a surrogate pair at character 1$"),
        ('{"text": "a", "label": "\\ud800"}', r"rows\.jsonl:2: 'label' holds half a surrogate pair"),
        ('{"text": "a\x00"}', r"rows\.jsonl:2: not JSON: Invalid control character"),
        ("\x00" * 9, r"rows\.jsonl:2: not JSON: Expecting value"),
        ('{"text": "a", 1: 2}', r"rows\.jsonl:2: not JSON: Expecting property name"),
        ('{"text": "a"} {"text": "b"}', r"rows\.jsonl:2: not JSON: Extra data"),
        ('["a"]', r'rows\.jsonl:2: expected a JSON object, found \["a"\]'),
        ('"' + "a" * 99 + '"', r"rows\.jsonl:2: expected a JSON object, found \"a+\.\.\.$"),
        ("{}", r"rows\.jsonl:2: the row lacks 'text' .*; found no fields"),
        ('{"txt": "a", "label": "x"}', r"rows\.jsonl:2: the row lacks 'text' .*; found 'txt', 'label'"),
        ('{"text": 5, "label": "x"}', r"rows\.jsonl:2: 'text' must be a string, found 5"),
        ('{"text": "a", "text_pair": null, "label": "x"}', r"rows\.jsonl:2: 'text_pair' must be a string, found null"),
        ('{"text": "a\\ud800", "label": "x"}', r"rows\.jsonl:2: 'text' holds half a surrogate pair at character 1"),
        ('{"text": "a"}', r"rows\.jsonl:2: the row lacks 'label'; found 'text'"),
        (
            '{"text": "a", "label": true}',
            r"rows\.jsonl:2: 'label' must be a non-empty string or an integer, found true",
        ),
        ('{"text": "a", "label": 0.5}', r"rows\.jsonl:2: 'label' must be .* found 0\.5"),
        ('{"text": "a", "label": ""}', r'rows\.jsonl:2: \'label\' must be .* found ""'),
        ('{"text": "a", "label": "\\u0000misrouted"}', r"rows\.jsonl:2: 'label' must be"),
    ],
)
def test_bad_line_is_named_with_what_was_found(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", '{"text": "a", "label": "x"}', line)
    with pytest.raises(DataError, match=message):
        read_rows(path, labelled=True)


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: not UTF-8 at byte 10"):
        read_rows(path, labelled=False)


def test_empty_file_holds_no_rows(tmp_path: Path) -> None:
    for lines in ((), ("",), ("", " ")):
        with pytest.raises(DataError, match=r"rows\.jsonl holds no rows"):
            read_rows(write(tmp_path / "rows.jsonl", *lines), labelled=False)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read rows from .*nowhere\.jsonl: No such file"):
        read_rows(tmp_path / "nowhere.jsonl", labelled=False)


def test_folder_is_no_file_of_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder without images, and rows come in a file"):
        read_rows(tmp_path, labelled=False)


def test_paths_of_images_start_from_the_files_folder(tmp_path: Path) -> None:
    uri = "data:image/png;base64,AAAA"
    rows = [{"image": "a/b.png"}, {"image": "/c.png"}, {"image": uri}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [row["image"] for row in read_rows(tmp_path / "rows.jsonl", labelled=False)]
    assert found == [str(tmp_path / "a/b.png"), "/c.png", uri]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"image": "https://example.org/a.png"}, "'image' must be a path or a data: URI, as nothing is fetched"),
        ({"image": 5}, "'image' must be a string, found 5"),
        ({"prompt": 5}, "'prompt' must be a string or a list of"),
        ({"messages": []}, r"'messages' must be a list of .* found \[\]"),
        ({"messages": [{"role": "user", "content": 5}]}, ".*both strings"),
    ],
)
def test_images_and_chats_of_another_form_are_named(tmp_path: Path, row: dict[str, object], words: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"rows.jsonl:1: {words}"):
        read_rows(tmp_path / "rows.jsonl", labelled=False)


def test_characters_of_chats_count() -> None:
    assert characters_of({"text": "abc", "text_pair": "de", "id": "xxxx"}) == 5
    assert characters_of({"messages": [{"role": "user", "content": "abc"}]}) > 3


def test_beside_a_text_other_fields_are_the_callers(tmp_path: Path) -> None:
    row = {"text": "a", "messages": "b", "prompt": 5, "image": "https://example.org/a.png"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert read_rows(tmp_path / "rows.jsonl", labelled=False) == [row]
    require_image(b"content", "here")
