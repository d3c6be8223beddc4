"""Executors: every item once, the same bits from each, and workers that die are retried."""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from tests.tiny import Family
from tests.workers import Square
from twinmerge.errors import MismatchError, MissingExtraError, RecipeError, WorkerError
from twinmerge.files.hashes import sha256_of
from twinmerge.jobs.merge import merge_models
from twinmerge.merging import executor as executor_module
from twinmerge.merging.executor import NAMES, RETRIES, Executor, Processes, Ray, Serial, Threads, make_executor
from twinmerge.merging.recipe import load_merge
from twinmerge.twin.decompose import write_weights

Get = Callable[[str], Family]
EXECUTORS: list[Executor] = [Serial(), Threads(2), Processes(2), Ray(2)]
ignore_ray = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def workers_find_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path.cwd()), *filter(None, sys.path)]))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")


@ignore_ray
@pytest.mark.timeout(900)  # each worker imports torch anew, and Ray runs them at the lowest priority
@pytest.mark.parametrize("executor", EXECUTORS, ids=lambda e: type(e).__name__)
def test_every_item_is_done_once_on_one_thread_and_a_refusal_is_its_own_error(
    tmp_path: Path, executor: Executor
) -> None:
    threads, found = torch.get_num_threads(), []
    with pytest.raises(MismatchError, match="^6 is refused$"):
        found.extend(executor.map(Square(tmp_path, refused=6), range(7)))
    assert set(found) <= {(n, (n * n, 1)) for n in range(6)}  # the last two run side by side
    assert len(set(found)) == len(found) >= 4
    assert list(executor.map(Square(tmp_path), [])) == []
    assert torch.get_num_threads() == threads


@ignore_ray
@pytest.mark.timeout(900)  # each worker imports torch anew, and Ray runs them at the lowest priority
@pytest.mark.parametrize("executor", EXECUTORS[2:], ids=lambda e: type(e).__name__)
def test_a_worker_that_dies_is_retried_but_not_for_ever(tmp_path: Path, executor: Executor) -> None:
    found = sorted(executor.map(Square(tmp_path, deadly=2, deaths=2), range(4)))
    assert [result for _, (result, _) in found] == [0, 1, 4, 9]
    with pytest.raises(WorkerError, match=f"workers died {RETRIES + 1} times without finishing a task"):
        list(executor.map(Square(tmp_path, deadly=2, deaths=99), [2]))
    assert len(list(tmp_path.iterdir())) == 2 + RETRIES + 1


# ---- weights


def kill_one_worker(told: list[int]) -> Callable[..., None]:
    """Progress that kills a worker, once, when the first tensor is done."""

    def progress(stage: str, done: int, total: int) -> None:
        workers = [p for p in psutil.Process().children(recursive=True) if is_worker(p)]
        if done and workers and not told:
            workers[0].kill()
            told.append(workers[0].pid)

    return progress


def is_worker(process: psutil.Process) -> bool:
    try:
        line = " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it ended since it was listed
        return False
    return line.startswith(("ray::_run_in_ray", "ray::IDLE")) or (
        "spawn_main" in line and "resource_tracker" not in line
    )


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_of(p) for p in folder.rglob("*.safetensors")}


@ignore_ray
@pytest.mark.timeout(900)  # each worker imports torch anew, and Ray runs them at the lowest priority
@pytest.mark.parametrize("executor", EXECUTORS, ids=lambda e: type(e).__name__)
def test_a_twins_weights_have_the_same_bits_from_each_though_a_worker_is_killed(
    family: Get, tmp_path: Path, executor: Executor
) -> None:
    plan = family("bert").plan(shared={"method": "ties"}, exclusive={"energy": 0.9})
    found, told = [], []
    for name, place in (("serial", Serial()), ("other", executor)):
        (tmp_path / name / "work").mkdir(parents=True)
        (tmp_path / name / "twin").mkdir()
        progress = kill_one_worker(told) if name == "other" else lambda *_: None
        report = write_weights(plan, tmp_path / name / "twin", tmp_path / name / "work", progress, executor=place)
        found.append((files(tmp_path / name / "twin"), report))
    assert found[0] == found[1]
    assert bool(told) == (executor in EXECUTORS[2:])


@ignore_ray
@pytest.mark.timeout(900)  # each worker imports torch anew, and Ray runs them at the lowest priority
@pytest.mark.parametrize("executor", EXECUTORS, ids=lambda e: type(e).__name__)
def test_a_merge_has_the_same_bits_from_each_though_a_worker_is_killed(
    family: Get, tmp_path: Path, executor: Executor
) -> None:
    root = family("llama").root
    recipe = tmp_path / "recipe.yaml"
    experts = "{" + ", ".join(f"{name}: {root / name}" for name in ("ag", "sms")) + "}"
    recipe.write_text(f"base: {root / 'base'}\nexperts: {experts}\nshared: {{method: dare_ties}}\n")
    merge_models(load_merge(recipe), tmp_path / "calm", executor=Serial())
    told: list[int] = []
    merge_models(load_merge(recipe), tmp_path / "other", executor=executor, progress=kill_one_worker(told))
    assert files(tmp_path / "calm") == files(tmp_path / "other")
    assert bool(told) == (executor in EXECUTORS[2:])


PROGRAM = """
import sys, time
from pathlib import Path
from twinmerge.merging.executor import Processes
if __name__ == "__main__":
    for _ in Processes(1).map(time.sleep, [0, 300]):
        Path(sys.argv[1]).touch()
"""


def test_no_worker_outlives_its_parent(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "started")]
    with subprocess.Popen(command) as process:
        while not (tmp_path / "started").exists():
            time.sleep(0.05)
        workers = [p for p in psutil.Process(process.pid).children(recursive=True) if is_worker(p)]
        process.kill()
    assert workers
    gone, alive = psutil.wait_procs(workers, timeout=20)
    assert (len(gone), alive) == (len(workers), [])


# ---- by name


def test_executors_by_name() -> None:
    cores = len(os.sched_getaffinity(0))
    made = [make_executor(name) for name in NAMES]
    assert made == [Serial(), Threads(cores), Processes(cores), Ray(cores)]
    assert [(e.workers, e.sharing) for e in made] == [(1, 1), (cores, cores), (cores, 1), (cores, 1)]
    assert make_executor("ray", 3, "head:6379") == Ray(3, "head:6379")
    assert make_executor("serial", 1) == Serial()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("threads", 1, "head:1"), "--ray-address is for --executor ray, found --executor threads"),
        (("serial", 2), "--executor serial has 1 worker, found --workers 2"),
        (("slurm",), "must be one of serial, threads, processes, ray, found 'slurm'"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(arguments: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_executor(*arguments)


def test_a_worker_process_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """In process, as coverage sees no other."""
    told: list[object] = []
    parent = SimpleNamespace(join=lambda: told.append("parent ended"))
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: parent)
    monkeypatch.setattr(os, "_exit", told.append)
    executor_module._end_with_parent()
    assert told == ["parent ended", 1]


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere", "ray://127.0.0.1:9"])
def test_an_address_without_a_cluster_is_refused_at_once(tmp_path: Path, address: str) -> None:
    with pytest.raises(RecipeError, match="--ray-address must be HOST:PORT of a Ray cluster, found"):
        list(Ray(1, address).map(Square(tmp_path), [1]))


def test_a_cluster_that_does_not_take_us_in_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no")

    ray = SimpleNamespace(init=refuse)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(executor_module, "_require_answer", len)
    with pytest.raises(RecipeError, match="^--ray-address head:1: no; where .* a token, Ray takes it from RAY_AUTH_"):
        list(Ray(1, "head:1").map(Square(tmp_path), [1]))


def test_ray_that_is_not_installed_names_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"install it with: pip install 'twinmerge\[ray\]'") as caught:
        list(Ray(1).map(Square(tmp_path), [1]))
    assert caught.value.exit_code == 1


def test_what_runs_in_a_worker_process_is_what_it_was_started_with(tmp_path: Path) -> None:
    """In process, as coverage sees no other; the thread that watches the parent has none to watch here."""
    threads = torch.get_num_threads()
    try:
        assert multiprocessing.parent_process() is None
        executor_module._start_process(Square(tmp_path))
        assert executor_module._run_in_process(3) == (9, 1)
        assert executor_module._run_in_ray(Square(tmp_path), 4) == (16, 1)
    finally:
        torch.set_num_threads(threads)
