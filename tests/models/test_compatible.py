"""What must agree before weights are mixed, and what may differ."""

import json
from pathlib import Path

import pytest
import torch

from twinmerge.errors import CheckpointError, MismatchError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.writer import save_tensors
from twinmerge.models.compatible import (
    Allow,
    compare_configs,
    compare_vocabularies,
    plausible_bound,
    require_plausible,
    require_related,
    require_values,
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


def nested(folders: tuple[Path, Path], ours: object, theirs: object) -> list[str]:
    base, expert = (opened(folder, 1.0, json.dumps(c)) for folder, c in zip(folders, (ours, theirs), strict=True))
    return list(compare_configs(base, "a", expert, Allow(config=True)))


@pytest.mark.parametrize("key", ["text_config", "vision_config", "quantization_config"])
def test_nested_key_that_only_one_side_has_is_no_other_model(folders: tuple[Path, Path], key: str) -> None:
    older = {key: {"hidden_size": 8, "inner": {"a": 1}, "dropout": 0.1, "torch_dtype": "float16"}}
    newer = {key: {"hidden_size": 8, "inner": {"a": 1, "b": 2}, "dropout": 0.0, "dtype": "float32", "mlp_bias": True}}
    assert nested(folders, older, newer) == []
    other = {key: {"hidden_size": 8, "inner": {"a": 2}}}
    assert nested(folders, older, other) == [f"'a': {key}.inner.a is 1 in base and 2 in a"]
    assert nested(folders, older, {key: 3})[0].startswith(f"'a': {key} is {{'hidden_size'")


def test_rope_of_nested_models_and_by_layer_type_is_compared(folders: tuple[Path, Path]) -> None:
    kinds = {
        "full": {"rope_theta": 1e6, "rope_type": "default"},
        "sliding": {"rope_theta": 1e4, "rope_type": "default"},
    }
    ours = {"text_config": {"rope_parameters": kinds}}
    assert nested(folders, ours, {"text_config": {"rope_parameters": {**kinds, "other": {"rope_theta": 5.0}}}}) == []
    other = {"text_config": {"rope_parameters": {**kinds, "full": {"rope_theta": 5e5, "rope_type": "default"}}}}
    assert "rope_parameters.full.rope_theta is 1000000.0" in nested(folders, ours, other)[0]
    other = {"text_config": {"rope_theta": 5e5}}
    assert (
        "text_config.rope_theta is 10000.0 in base and 500000.0" in nested(folders, {"text_config": {"a": 1}}, other)[0]
    )
    old, new = {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}
    assert "rope_scaling.rope_type is 'linear'" in nested(folders, {"rope_scaling": old}, {"rope_scaling": new})[0]


@pytest.mark.parametrize(
    ("names", "settings", "found"),
    [
        (["a.qweight", "a.scales"], {"quant_method": "gptq"}, "quantization_config of gptq in config.json"),
        (["w"], {"quant_method": "bitsandbytes"}, "quantization_config of bitsandbytes in config.json"),
        (["w"], {"load_in_8bit": True}, "quantization_config of an unnamed method in config.json"),
        *((["w", name], None, f"'{name}' in model.safetensors") for name in ("a.qweight", "a.weight.absmax", "a.SCB")),
        *((["w", name], None, f"'{name}' in model.safetensors") for name in ("a.weight_scale_inv", "x.down_blocks")),
        (["w", "int.weight"], None, "'int.weight' in model.safetensors"),
    ],
)
def test_quantised_folder_is_named_as_such(tmp_path: Path, names: list[str], settings: object, found: str) -> None:
    tensors = {n: torch.ones(2, dtype=torch.int8 if n.startswith("int") else torch.float32) for n in names}
    save_tensors(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    with pytest.raises(MismatchError, match=f"is quantised \\({found}\\): its numbers are codes"):
        require_values(Checkpoint.open(tmp_path))


def test_integer_buffers_and_plain_eight_bits_are_not_quantised(tmp_path: Path) -> None:
    tensors = {"position_ids": torch.arange(3), "w.weight": torch.ones(3).to(torch.float8_e4m3fn)}
    save_tensors(tensors, tmp_path / "model.safetensors")
    require_values(Checkpoint.open(tmp_path))


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
