"""What other tools merge into a wrong model without a word: through the program, one clear line, exit 2, no file."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests import tiny
from tests.tiny import EXPERTS, rewrite
from twinmerge.cli import main
from twinmerge.files.checkpoint import Checkpoint

Spoil = Callable[[Path], Any]
MERGE, BUILD, KIT = "merge", "build", "kit"
LAYER = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llama")
    tiny.make_family(root, tiny.llama(), tiny.transformers.LlamaForCausalLM)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A base, its experts and a recipe for each command; a test may spoil them."""
    copy = shutil.copytree(made, tmp_path / "models")
    experts = {name: {"model": name, "router_data": f"{name}.jsonl"} for name in EXPERTS}
    models = [{"model": str(copy / name), "parameters": {"weight": 0.5, "density": 0.5}} for name in EXPERTS]
    recipes: dict[str, dict[str, Any]] = {
        MERGE: {"base": "base", "experts": {name: name for name in EXPERTS}, "shared": {"method": "ties"}},
        BUILD: {"base": "base", "experts": experts, "shared": {"method": "ties"}, "exclusive": {"rank": 2}},
        KIT: {"merge_method": "ties", "base_model": str(copy / "base"), "models": models},
    }
    for name, content in recipes.items():
        (copy / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return copy


def run(root: Path, recipe: str, *options: str) -> int:
    command = BUILD if recipe == BUILD else MERGE
    return main([command, str(root / f"{recipe}.yaml"), "--out", str(root / "made" / "out"), *options])


def refused(root: Path, recipe: str, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line that a refusal prints."""
    before = contents(root)
    capsys.readouterr()
    assert run(root, recipe, *options) == 2
    printed = capsys.readouterr()
    [line] = [line for line in printed.err.splitlines() if line.startswith("twinmerge: error: ")]
    assert printed.out == ""
    assert contents(root) == before
    return line.removeprefix("twinmerge: error: ")


def contents(root: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def weights(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    """Change a model's tensors in place, or give new ones."""

    def spoil(root: Path) -> None:
        rewrite(root / name / "model.safetensors", lambda tensors: change(tensors) or tensors)

    return spoil


def value(tensor: str, to: float, expert: str = "sms") -> Spoil:
    return weights(expert, lambda tensors: tensors[tensor].view(-1)[-1:].fill_(to) is None)


def random_weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    return {name: torch.randn_like(tensor) * 0.2 for name, tensor in tensors.items()}


def config(expert: str, change: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(root: Path) -> None:
        path = root / expert / "config.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return spoil


def recipe(name: str, change: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(root: Path) -> None:
        path = root / f"{name}.yaml"
        content = yaml.safe_load(path.read_text())
        change(content)
        path.write_text(yaml.safe_dump(content, sort_keys=False))

    return spoil


def flip(bit: int, place: int) -> Spoil:
    """Flip a bit of a byte of an expert's file, counted from its end (negative) or its start."""

    def spoil(root: Path) -> None:
        path = root / "sms" / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[place] ^= 1 << bit
        path.write_bytes(content)

    return spoil


def cancel(method: str) -> Spoil:
    def change(content: dict[str, Any]) -> None:
        content["merge_method"] = method
        for model, weight in zip(content["models"], (1, -1, 0), strict=True):
            model["parameters"] = {"weight": weight}

    return recipe(KIT, change)


def cut(root: Path) -> None:
    file = root / "sms" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


BOTH = (MERGE, BUILD, KIT)
CASES: dict[str, tuple[Spoil, tuple[str, ...], str]] = {
    "NaN": (value(LAYER, float("nan")), BOTH, rf"sms'?: '{LAYER}' in .*sms/model\.safetensors.* has 1 NaN or Inf"),
    "Inf": (value(LAYER, float("inf")), BOTH, rf"sms'?: '{LAYER}' in .*sms/model\.safetensors.* has 1 NaN or Inf"),
    "NaN in an embedding": (value(EMBEDDING, float("nan")), BOTH, rf"'{EMBEDDING}' in .* has 1 NaN or Inf values"),
    "NaN in the base": (value(LAYER, float("nan"), "base"), BOTH, rf"base: '{LAYER}' in .*base/model\.s.* has 1 NaN"),
    "weights that cancel": (cancel("linear"), (KIT,), "weights must not sum to zero when they are normalised"),
    "weights that cancel in TIES": (cancel("ties"), (KIT,), "weights must not sum to zero when they are normalised"),
    "unrelated base": (
        weights("base", random_weights),
        BOTH,
        r"is no fine-tune of this base: the cosine of their matrices must be at least 0\.5, found -?0\.0",
    ),
    "unrelated expert": (weights("sms", random_weights), BOTH, r"sms' is no fine-tune of this base: .* distance"),
    "misspelt key": (
        recipe(BUILD, lambda r: r.update(exclusiv=r.pop("exclusive"))),
        (BUILD,),
        r"build\.yaml:\d+: unknown key 'exclusiv'; did you mean 'exclusive'\?$",
    ),
    "misspelt key of a merge": (
        recipe(MERGE, lambda r: r.update(dtpye="bfloat16")),
        (MERGE,),
        r"merge\.yaml:\d+: unknown key 'dtpye'; did you mean 'dtype'\?$",
    ),
    "misspelt key of mergekit's": (
        recipe(KIT, lambda r: r.update(base_modle="x")),
        (KIT,),
        r"kit\.yaml:\d+: unknown key 'base_modle'; did you mean 'base_model'\?$",
    ),
    "misspelt parameter": (
        lambda root: [recipe(n, lambda r: r["shared"].update(densty=0.2))(root) for n in (MERGE, BUILD)],
        (MERGE, BUILD),
        r"yaml:\d+: unknown key 'densty' under shared; did you mean 'density'\?$",
    ),
    "misspelt parameter of mergekit's": (
        recipe(KIT, lambda r: r["models"][1]["parameters"].update(wieght=1)),
        (KIT,),
        r"kit\.yaml:\d+: unknown key 'wieght' under models\.1\.parameters; did you mean 'weight'\?$",
    ),
    "flipped byte in the header": (flip(7, 12), BOTH, r"sms/model\.safetensors is no safetensors file: its header"),
    "flipped bit of an exponent": (
        flip(6, -1),
        BOTH,
        r"sms'?: '.*' in .*sms/model\.safetensors.* (holds .*, more than .*; the file is damaged|NaN or Inf)",
    ),
    "extra tensor": (
        weights("sms", lambda tensors: {**tensors, "model.layers.2.mlp.up_proj.weight": torch.ones(2, 2)}),
        BOTH,
        r"sms' has 1 tensors that .* lacks, first 'model\.layers\.2\.mlp\.up_proj\.weight'",
    ),
    "extra tensor beside the model": (
        weights("sms", lambda tensors: {**tensors, "score.weight": torch.ones(2, 2)}),
        BOTH,
        r"sms' has 1 tensors that .* lacks, first 'score\.weight'",
    ),
    "missing tensor": (
        weights("sms", lambda tensors: {k: v for k, v in tensors.items() if k != LAYER}),
        BOTH,
        rf"sms' lacks 1 of \d+ (tensors|parameters), first '{LAYER}'",
    ),
    "another shape": (
        weights("sms", lambda tensors: {**tensors, EMBEDDING: tensors[EMBEDDING][:-1].clone()}),
        BOTH,
        rf"sms'?: '{EMBEDDING}' has shape \[63, 16\]",
    ),
    "another rope": (
        config("sms", lambda c: c["rope_parameters"].update(rope_theta=5e5)),
        BOTH,
        r"sms' is another model: rope.* 10000\.0.* in base and .*500000\.0.* in sms; --allow-config-differences",
    ),
    "truncated file": (cut, BOTH, r"^\S*sms/model\.safetensors is truncated: tensor '.*' ends at byte"),
    "unknown method": (
        lambda root: [recipe(n, lambda r: r["shared"].update(method="tees"))(root) for n in (MERGE, BUILD)],
        (MERGE, BUILD),
        "yaml:.* must be pretrained or average or .* or ties or dare_linear or dare_ties, found 'tees'$",
    ),
    "unknown method of mergekit's": (
        recipe(KIT, lambda r: r.update(merge_method="tees")),
        (KIT,),
        "'tees' is not supported; known are linear, task_arithmetic, ties, dare_linear, dare_ties, slerp$",
    ),
}
for number in (20, -0.5, 0):
    CASES[f"density {number}"] = (
        lambda root, number=number: [recipe(n, lambda r: r["shared"].update(density=number))(root) for n in BOTH[:2]],
        (MERGE, BUILD),
        rf"yaml:\d+: shared.*density: .*, found {number}$",
    )
    CASES[f"density {number} of mergekit's"] = (
        recipe(KIT, lambda r, number=number: r["models"][0]["parameters"].update(density=number)),
        (KIT,),
        rf"kit\.yaml:\d+: .*density: must be the fraction kept, in \(0, 1\], found {number}$",
    )


@pytest.mark.parametrize(
    ("case", "command"), [(case, command) for case, (_, commands, _) in CASES.items() for command in commands]
)
def test_what_cannot_be_right_is_one_line_and_no_file(
    root: Path, case: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, _, words = CASES[case]
    spoil(root)
    line = refused(root, command, capsys)
    with pytest.raises(ValueError, match=words):
        raise ValueError(line)


@pytest.mark.parametrize("command", BOTH)
def test_a_folder_of_shards_is_refused_or_replaced_whole(
    root: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A single file beside an older index would be read by the index."""
    out = root / "made" / "out"
    tiny.llama().save_pretrained(out, max_shard_size="10KB")
    assert (out / "model.safetensors.index.json").exists()
    assert "out exists already; choose another path, or overwrite it" in refused(root, command, capsys)
    assert run(root, command, "--overwrite") == 0
    names = {path.name for path in out.glob("*.safetensors*")}
    assert names == {"model.safetensors"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def pad(root: Path) -> None:
    """Six rows more than config.json says in every embedding."""
    for name in ("base", *EXPERTS):
        weights(name, lambda t: {**t, EMBEDDING: torch.cat([t[EMBEDDING], t[EMBEDDING][:6]])})(root)


@pytest.mark.parametrize("command", [MERGE, KIT])
def test_rows_beyond_the_vocabulary_are_kept(root: Path, command: str) -> None:
    pad(root)
    assert run(root, command) == 0
    assert Checkpoint.open(root / "made" / "out").specs[EMBEDDING].shape == (tiny.VOCABULARY + 6, 16)


def test_rows_beyond_the_vocabulary_make_no_twin(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Transformers would not load it."""
    pad(root)
    words = rf"base: '{EMBEDDING}' has shape \[70, 16\], by config.json it must be \[64, 16\]"
    with pytest.raises(ValueError, match=words):
        raise ValueError(refused(root, BUILD, capsys))
