"""What must agree before weights are mixed, and what may differ."""

import json
from pathlib import Path

import pytest
import torch

from twinmerge.errors import CheckpointError, MismatchError
from twinmerge.files.checkpoint import Checkpoint, save_tensors
from twinmerge.models.compatible import (
    Allow,
    compare_configs,
    compare_vocabularies,
    plausible_bound,
    require_plausible,
    require_related,
)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("base", "a"):
        (tmp_path / name).mkdir()
    return tmp_path / "base", tmp_path / "a"


def differences(folders: tuple[Path, Path], file: str, ours: str, theirs: str) -> list[str]:
    for folder, text in zip(folders, (ours, theirs), strict=True):
        (folder / file).write_text(text)
    return list(compare_vocabularies(folders[0], "a", folders[1], Allow()))


def test_tokenizer_files_that_differ_in_form_alone_agree(folders: tuple[Path, Path]) -> None:
    vocabulary = {"model": {"vocab": {"x": 0}}, "added_tokens": [{"content": "y", "id": 1}]}
    written = json.dumps(vocabulary), json.dumps({"model": {"vocab": {"x": 0, "y": 1}}}, indent=1)
    assert differences(folders, "tokenizer.json", *written) == []


def test_unigram_and_plain_vocabularies_are_read(folders: tuple[Path, Path]) -> None:
    ours, theirs = (json.dumps({"model": {"vocab": [["x", score], ["y", -1]]}}) for score in (-2, -3))
    assert differences(folders, "tokenizer.json", ours, theirs) == []
    with pytest.raises(MismatchError, match="token 'y' is 1 in .*vocab.json and absent in .*, 2 and 1 tokens"):
        differences(folders, "vocab.json", '{"x": 0, "y": 1}', '{"x": 0}')


def test_other_vocabulary_files_must_be_equal(folders: tuple[Path, Path]) -> None:
    with pytest.raises(MismatchError, match="'a' has another vocabulary: vocab.txt differs"):
        differences(folders, "vocab.txt", "x", "y")


def test_a_tokenizer_that_is_no_json_is_named(folders: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer.json is not valid JSON"):
        differences(folders, "tokenizer.json", "{", "{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json is no tokenizer of a known form"):
        differences(folders, "tokenizer.json", '{"model": {"vocab": 3}}', "{}")


def opened(folder: Path, value: float, config: str | None = None) -> Checkpoint:
    save_tensors({"w": torch.full((3, 3), value)}, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(config)
    return Checkpoint.open(folder)


def test_harmless_keys_and_absent_configs_are_no_difference(folders: tuple[Path, Path]) -> None:
    base = opened(folders[0], 1.0, '{"model_type": "x", "num_labels": 2, "attention_dropout": 0.1}')
    expert = opened(folders[1], 1.0, '{"model_type": "x", "num_labels": 3, "attention_dropout": 0}')
    assert list(compare_configs(base, "a", expert, Allow())) == []
    (folders[1] / "config.json").unlink()
    assert list(compare_configs(base, "a", Checkpoint.open(folders[1]), Allow())) == []


def test_rope_and_keys_left_out_may_be_written_in_two_ways(folders: tuple[Path, Path]) -> None:
    older = opened(folders[0], 1.0, '{"rope_theta": 10000.0, "rope_scaling": null, "mlp_bias": false}')
    newer = opened(folders[1], 1.0, '{"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}')
    assert list(compare_configs(older, "a", newer, Allow())) == []
    scaled = opened(folders[1], 1.0, '{"rope_parameters": {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4}}')
    with pytest.raises(MismatchError, match="rope_scaling is None in base and {.*'yarn'.*} in a"):
        list(compare_configs(older, "a", scaled, Allow()))


def test_what_only_newer_versions_write_out_is_no_difference_but_rope_is(folders: tuple[Path, Path]) -> None:
    older = opened(folders[0], 1.0, '{"hidden_size": 8}')
    newer = opened(folders[1], 1.0, '{"hidden_size": 8, "tie_word_embeddings": true, "rope_theta": 10000.0}')
    assert list(compare_configs(older, "a", newer, Allow())) == []
    other = opened(folders[1], 1.0, '{"hidden_size": 8, "rope_theta": 500000.0}')
    with pytest.raises(MismatchError, match="rope_theta is 10000.0 in base and 500000.0 in a"):
        list(compare_configs(older, "a", other, Allow()))


def test_values_out_of_all_proportion_are_refused() -> None:
    bound = plausible_bound(0.5)
    assert require_plausible(torch.tensor([-3.0, 1.0]), "x", bound=bound) == 3.0
    assert require_plausible(torch.zeros(0), "x", bound=bound) == 0.0
    with pytest.raises(CheckpointError, match=r"^x holds 2e\+04, more than 1e\+04, 10,000 times the largest value"):
        require_plausible(torch.tensor([2e4]), "x", bound=bound)
    with pytest.raises(CheckpointError, match=r"^x \(from entry 5\) has 1 NaN or Inf"):
        require_plausible(torch.tensor([float("nan")]), "x", 5)


def test_nothing_to_compare_is_related(folders: tuple[Path, Path]) -> None:
    base, expert = opened(folders[0], 0.0), opened(folders[1], 1.0)
    assert require_related(base, "a", expert, [("w", "w")]) == 1.0
    assert require_related(base, "a", expert, []) == 1.0
    assert require_related(expert, "a", expert, [("w", "w")]) == pytest.approx(1.0)
