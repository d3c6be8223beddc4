"""Model folders: what is never run, and what tensors are called by their class."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import EXPERTS, Family
from twinmerge.cli import main

Get = Callable[[str], Family]


def with_code(folder: Path, file: str, **settings: Any) -> Path:
    """Let a JSON file of a folder name a class of Python code that leaves a trace beside it."""
    trace = folder / "it-ran"
    code = f"open({str(trace)!r}, 'w').close()\nfrom transformers import BertConfig\nclass Own(BertConfig): pass\n"
    (folder / "own.py").write_text(code)
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **settings}))
    return trace


CODE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "base": ("base", "config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}),
    "expert": ("sms", "config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}),
    "tokenizer": (
        "base",
        "tokenizer_config.json",
        {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
    ),
}


@pytest.mark.parametrize("command", ["plan", "build"])
@pytest.mark.parametrize("where", CODE)
def test_python_of_a_folder_is_never_run_and_nobody_is_asked(
    family: Get,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
    command: str,
) -> None:
    root = shutil.copytree(family("bert").root, tmp_path / "models")
    model, file, settings = CODE[where]
    if where == "tokenizer":
        (root / "base" / "tokenizer.json").unlink()
    trace = with_code(root / model, file, **settings)
    experts = {name: {"model": name, "router_data": f"{name}.jsonl"} for name in EXPERTS}
    (root / "r.yaml").write_text(yaml.safe_dump({"base": "base", "experts": experts, "exclusive": {"rank": 2}}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    out = [] if command == "plan" else ["--out", str(tmp_path / "out")]
    assert main([command, str(root / "r.yaml"), *out]) == 2
    printed = capsys.readouterr()
    assert not trace.exists()
    assert not (tmp_path / "out").exists()
    assert sys.stdin.read() == "y\n"
    assert printed.out == ""
    assert f"{root / model}: by auto_map in {file} its class is Python code of the folder, which is never run" in (
        printed.err
    )
