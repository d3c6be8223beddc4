"""Work that was ended, by whatever, is gone on with by --resume: the bytes are those of a run that was not ended."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.tiny import EXPERTS, Family
from tests.workers import Deadly
from twinmerge.cli import main
from twinmerge.errors import MismatchError, WorkerError
from twinmerge.files.hashes import sha256_of
from twinmerge.hf.batches import BatchLimits, PredictSettings
from twinmerge.jobs import grow, predict
from twinmerge.jobs.build import build
from twinmerge.jobs.merge import merge_models
from twinmerge.merging import executor as executors
from twinmerge.merging.executor import Processes, Serial

Job = Callable[..., Any]
Tell = Callable[..., None]


@dataclass(frozen=True)
class Work:
    """Jobs of one family, each of which writes to a place of a test's."""

    family: Family
    twin: Path
    rows: Path

    def run(self, job: str, out: Path, **settings: Any) -> Any:
        """Run one job; `progress` is told of its stages."""
        root = self.family.root
        if job == "build":
            return build(root / "build.yaml", out, **{"executor": Serial(), **settings})
        if job == "merge":
            return merge_models(root / "merge.yaml", out, **{"executor": Serial(), **settings})
        if job == "predict":
            progress = settings.pop("progress", lambda *_: None)
            few = PredictSettings(None, BatchLimits(rows=2), max_new_tokens=2)
            return predict.predict_file(
                self.twin,
                self.rows,
                out,
                few,
                progress=lambda done, total: progress("predicting", done, total),
                **settings,
            )
        return grow.add(self.twin, "new", model=root / "sms", router_data=root / "ag.jsonl", out=out, **settings)


STAGES = {"build": ("decomposing", 7), "merge": ("merging", 7), "predict": ("predicting", 6), "add": ("decomposing", 7)}
"""Where each job is ended, with something finished."""


@pytest.fixture(scope="module")
def work(
    family: Callable[[str], Family], twin: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Work]:
    root = Path(shutil.copytree(family("llama").root, tmp_path_factory.mktemp("resume") / "family"))
    experts = "".join(f"  {name}: {{model: {name}, router_data: {name}.jsonl}}\n" for name in EXPERTS)
    (root / "build.yaml").write_text(f"base: base\nexperts:\n{experts}exclusive: {{rank: 2}}\n")
    models = "".join(f"  {name}: {name}\n" for name in EXPERTS)
    (root / "merge.yaml").write_text(f"base: base\nexperts:\n{models}shared: {{method: dare_linear}}\n")
    rows = root / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny.text_rows("sms", 12)))
    made = Family(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "WINDOW_ROWS", 4)
        folder = build(made.recipe(exclusive={"rank": 2}), root / "twin").path
        yield Work(made, folder, rows)


@pytest.fixture(scope="module")
def calm(work: Work) -> Callable[[str], dict[str, str]]:
    """What a job writes undisturbed, made once."""
    found: dict[str, dict[str, str]] = {}

    def get(job: str) -> dict[str, str]:
        if job not in found:
            work.run(job, work.family.root / f"calm-{job}")
            found[job] = contents(work.family.root / f"calm-{job}")
        return found[job]

    return get


def contents(out: Path) -> dict[str, str]:
    """The hash of every file; of a manifest all but the times and what depends on the place."""
    if out.is_file():
        return {"": sha256_of(out)}
    found = {str(p.relative_to(out)): sha256_of(p) for p in sorted(out.rglob("*")) if p.is_file()}
    for name in {"twin.json", "merge.json"} & set(found):
        manifest = json.loads((out / name).read_text())
        changes = [change.pop("at") for change in manifest.get("changes", [])]
        found[name] = json.dumps({**manifest, "created": len(changes), "root": None})
    return found


def end_at(job: str, error: Callable[[], Any]) -> Tell:
    """Progress that ends the job in the middle of its work."""
    stage, moment = STAGES[job]

    def tell(now: str, done: int, total: int) -> None:
        if (now, done >= moment) == (stage, True):
            error()

    return tell


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(28, "No space left on device"), WorkerError("workers died")], ids=repr
)
@pytest.mark.parametrize("job", STAGES)
def test_a_failure_keeps_the_work_and_resume_gives_the_same_bytes(
    work: Work, calm: Callable[[str], dict[str, str]], tmp_path: Path, job: str, error: BaseException
) -> None:
    error.__notes__ = []
    with pytest.raises(type(error)) as caught:
        work.run(job, tmp_path / "out", progress=end_at(job, raising(error)))
    assert caught.value.__notes__[0].endswith("are kept: go on with --resume")
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    told: list[int] = []
    work.run(job, tmp_path / "out", resume=True, progress=lambda stage, done, total: told.append(done))
    assert told[0] >= STAGES[job][1] - 2
    assert contents(tmp_path / "out") == calm(job)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("job", STAGES)
def test_a_refusal_keeps_nothing_that_mended_input_would_not_use(work: Work, tmp_path: Path, job: str) -> None:
    """Answered rows are used: the rows that they answer are verified."""
    with pytest.raises(MismatchError, match="refused"):
        work.run(job, tmp_path / "out", progress=end_at(job, raising(MismatchError("refused"))))
    assert [path.name for path in tmp_path.iterdir()] == ([".out.partial"] if job == "predict" else [])


@pytest.mark.parametrize("job", STAGES)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_is_resumed_to_the_same_bytes(
    work: Work, calm: Callable[[str], dict[str, str]], tmp_path: Path, job: str, number: signal.Signals
) -> None:
    child = os.fork()
    if child == 0:
        work.run(job, tmp_path / "out", progress=end_at(job, lambda: os.kill(os.getpid(), number)))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -number
    assert ".out.partial" in {path.name for path in tmp_path.iterdir()}
    work.run(job, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == calm(job)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("job", ["build", "merge"])
def test_dead_workers_are_resumed_to_the_same_bytes(
    work: Work, calm: Callable[[str], dict[str, str]], tmp_path: Path, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes, which really die after a few tasks."""
    monkeypatch.setattr(executors, "RETRIES", 0)
    (tmp_path / "done").mkdir()
    with pytest.raises(WorkerError, match="workers died") as caught:
        work.run(job, tmp_path / "out", executor=Deadly(Processes(1), tmp_path / "done", 7))
    assert caught.value.__notes__[0].endswith("are kept: go on with --resume")
    assert not (tmp_path / "out").exists()
    work.run(job, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == calm(job)


@pytest.mark.parametrize("job", ["build", "merge"])
def test_an_interrupted_program_says_in_one_line_how_to_go_on(
    work: Work, tmp_path: Path, job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [job, str(work.family.root / f"{job}.yaml"), "--out", str(tmp_path / "out"), "--executor", "serial"]
    run = Serial.map

    def interrupted(self: Serial, task: Any, items: Any) -> Any:
        yield from run(self, task, items[:5])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Serial, "map", interrupted)
        assert main(command) == 130
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line == "twinmerge: error: interrupted; 5 finished parts are kept: go on with --resume"
    assert main(command) == 2
    assert "say --resume to go on, or --overwrite to start anew" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
