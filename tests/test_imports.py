"""The command line starts without the heavy packages, and the package's surface is what it says."""

import json
import subprocess
import sys

import pytest

import twinmerge

HEAVY = ["huggingface_hub", "jinja2", "matplotlib", "numpy", "peft", "pydantic", "safetensors", "scipy", "sklearn"]
HEAVY += ["torch", "transformers"]


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"], ["eval", "--help"], ["--nonsense"]])
def test_help_and_usage_errors_import_nothing_heavy(arguments: list[str]) -> None:
    assert _loaded_by("runpy.run_module('twinmerge', run_name='__main__')", arguments).isdisjoint(HEAVY)


def test_import_of_the_package_imports_nothing_heavy() -> None:
    assert _loaded_by("__import__('twinmerge')").isdisjoint(HEAVY)


def test_public_names_are_sorted_and_exist() -> None:
    assert list(twinmerge.__all__) == sorted(twinmerge.__all__)
    assert len(set(twinmerge.__all__)) == len(twinmerge.__all__)
    for name in twinmerge.__all__:
        assert getattr(twinmerge, name) is not None


def test_dir_lists_the_public_names() -> None:
    assert set(twinmerge.__all__) <= set(dir(twinmerge))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = twinmerge.no_such_name


def _loaded_by(statement: str, arguments: list[str] | None = None) -> set[str]:
    """The top-level packages in `sys.modules` of a fresh interpreter after a statement, whether or not it exits."""
    program = f"""
import json, runpy, sys
sys.argv = ["twinmerge", *{arguments or []!r}]
try:
    {statement}
except SystemExit:
    pass
sys.stdout.write("\\n" + json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_static_merges_do_without_the_model_library() -> None:
    """It takes seconds and 170 MB, which a merge of weights has no use for."""
    assert _loaded_by("__import__('twinmerge.jobs.documents')").isdisjoint({"transformers", "peft", "sklearn"})
