"""Checkpoints of any content, and damage of any kind: a CheckpointError, never another exception, never silence."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny import write_checkpoint
from twinmerge.errors import CheckpointError
from twinmerge.files.checkpoint import DTYPES, INDEX, WEIGHTS, Checkpoint

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
SETS = st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(sorted(DTYPES))), min_size=1, max_size=6)


def random_tensor(shape: tuple[int, ...], dtype: str) -> Tensor:
    """Any bits that the type has."""
    torch_type = DTYPES[dtype]
    if torch_type is torch.bool:
        return torch.rand(shape) < 0.5
    return torch.randint(0, 256, (*shape, torch_type.itemsize), dtype=torch.uint8).view(torch_type).reshape(shape)


def bits(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def complaint(path: Path) -> str | None:
    """What is wrong with a folder; None if it opens, and then everything is read in the sizes that its headers say."""
    try:
        checkpoint = Checkpoint.open(path)
    except CheckpointError as error:
        return str(error)
    assert isinstance(checkpoint.config, dict)
    for name, spec in checkpoint.specs.items():
        assert checkpoint.read_flat(name, 0, spec.numel).nbytes == spec.nbytes
        assert checkpoint.read(name).shape == spec.shape
    return None


@given(tensors=SETS, shard=st.integers(1, 400))
def test_any_set_of_tensors_is_read_back_to_the_bit_by_us_and_by_safetensors(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[tuple[int, ...], str]], shard: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    made = {name: random_tensor(*entry) for name, entry in tensors.items()}
    write_checkpoint(folder, made, shard)
    checkpoint = Checkpoint.open(folder)
    theirs = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    assert checkpoint.specs.keys() == theirs.keys() == made.keys()
    for name, tensor in made.items():
        assert checkpoint.specs[name].shape == tensor.shape
        for found in (checkpoint.read(name), checkpoint.read_flat(name, 0, tensor.numel()), theirs[name]):
            assert found.dtype == tensor.dtype
            assert bits(found) == bits(tensor)
        if tensor.ndim and len(tensor):
            assert bits(checkpoint.read_rows(name, 1, len(tensor))) == bits(tensor[1:].contiguous())


def model(folder: Path) -> Path:
    """Two tensors in one file."""
    write_checkpoint(folder, {"a": torch.randn(2, 3), "b": torch.arange(4)}, 10**6)
    return folder / WEIGHTS


def sharded(folder: Path) -> Path:
    write_checkpoint(folder, {"a": torch.randn(2, 3), "b": torch.arange(4)}, 1)
    return folder / INDEX


@given(keep=st.integers(0, 400))
def test_a_truncated_file_is_damage_wherever_it_was_cut(tmp_path_factory: pytest.TempPathFactory, keep: int) -> None:
    file = model(tmp_path_factory.mktemp("cut"))
    content = file.read_bytes()
    file.write_bytes(content[: min(keep, len(content) - 1)])
    with pytest.raises(CheckpointError, match=str(file)):
        Checkpoint.open(file.parent)


@given(more=st.binary(min_size=1, max_size=40))
def test_bytes_that_no_tensor_owns_are_damage(tmp_path_factory: pytest.TempPathFactory, more: bytes) -> None:
    file = model(tmp_path_factory.mktemp("more"))
    file.write_bytes(file.read_bytes() + more)
    with pytest.raises(CheckpointError, match="bytes that belong to no tensor"):
        Checkpoint.open(file.parent)


Edit = Callable[[bytes], bytes]
EDITS: st.SearchStrategy[Edit] = st.one_of(
    st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=30)).map(
        lambda drawn: lambda raw: raw[: drawn[0]] + drawn[1] + raw[drawn[0] + len(drawn[1]) :]
    ),
    st.tuples(st.integers(0, 200), st.integers(1, 60)).map(
        lambda drawn: lambda raw: raw[: drawn[0]] + raw[drawn[0] + drawn[1] :]
    ),
    st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=30)).map(
        lambda drawn: lambda raw: raw[: drawn[0]] + drawn[1] + raw[drawn[0] :]
    ),
    st.tuples(
        st.sampled_from([b"F32", b"I64", b"[2,3]", b"[4]", b"[0,24]", b'"a"', b'"shape"', b'"data_offsets"', b"24"]),
        st.sampled_from(
            [b"null", b"[]", b"{}", b"-1", b"1e3", b"true", b'"F64"', b"[[1]]", b"[24,0]", b"NaN", b'"\\ud800"']
        ),
    ).map(lambda drawn: lambda raw: raw.replace(*drawn, 1)),
)


@given(edit=EDITS)
@example(edit=lambda raw: (10**5).to_bytes(8, "little") + b"[" * 10**5)
@example(edit=lambda raw: (10**4).to_bytes(8, "little") + b'{"a":' + b"1" * (10**4 - 6) + b"}")
def test_a_damaged_header_is_refused_or_says_what_the_file_holds(
    tmp_path_factory: pytest.TempPathFactory, edit: Edit
) -> None:
    file = model(tmp_path_factory.mktemp("header"))
    file.write_bytes(edit(file.read_bytes()))
    found = complaint(file.parent)
    assert found is None or str(file) in found


@given(edit=EDITS)
@example(edit=lambda raw: b'{"weight_map": {"a": "' + b"x" * 5000 + b'"}}')
@example(edit=lambda raw: b'{"weight_map": {"a": "\\u0000"}}')
@example(edit=lambda raw: b'{"weight_map": {"a": ["model"]}}')
@example(edit=lambda raw: b'{"weight_map": {"a": "."}}')
@example(edit=lambda raw: b"[" * 10**5)
def test_a_damaged_index_is_refused_or_is_the_index(tmp_path_factory: pytest.TempPathFactory, edit: Edit) -> None:
    index = sharded(tmp_path_factory.mktemp("index"))
    index.write_bytes(edit(index.read_bytes()))
    found = complaint(index.parent)
    assert found is None or str(index.parent) in found or "in two shards" in found
    assert found or {"a", "b"} == Checkpoint.open(index.parent).specs.keys()


@given(raw=st.one_of(st.binary(max_size=60), st.sampled_from([b"[" * 10**5, b"\xff\xfe{}", b'{"a": 1e999}'])))
def test_a_damaged_config_is_refused_or_an_object(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    file = model(tmp_path_factory.mktemp("config"))
    (file.parent / "config.json").write_bytes(raw)
    found = complaint(file.parent)
    assert found is None or "config.json" in found


HEADERS = {
    "a name that stands twice": '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],'
    '"data_offsets":[4,8]}}',
    "a hole before a tensor": '{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
    "a hole between tensors": '{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"F32","shape":[1],'
    '"data_offsets":[4,8]}}',
    "a side beyond every machine": '{"a":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]},"b":{'
    '"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "a side that is no number": '{"a":{"dtype":"F32","shape":[true,2],"data_offsets":[0,8]}}',
    "a name that is no text": '{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "an entry more": '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"__metadata__":{"format":1}}',
}


@pytest.mark.parametrize("case", HEADERS)
def test_what_safetensors_forbids_is_damage(tmp_path: Path, case: str) -> None:
    header = HEADERS[case].encode()
    (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=WEIGHTS):
        Checkpoint.open(tmp_path)


def test_a_folder_where_a_file_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        Checkpoint.open(tmp_path)


def test_a_config_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    model(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: Is a directory"):
        Checkpoint.open(tmp_path)


def test_renamed_tensors_keep_their_data_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    model(tmp_path)
    found = Checkpoint.open(tmp_path)
    renamed = found.renamed({"a": "c"})
    assert {name: spec.name for name, spec in renamed.specs.items()} == {"b": "b", "c": "c"}
    assert torch.equal(renamed.read("c"), found.read("a"))
    with pytest.raises(CheckpointError, match="two tensors are called 'b'"):
        found.renamed({"a": "b"})


def test_an_index_names_only_text(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"]["a"] = 1
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="names shard '1', which is not in the folder"):
        Checkpoint.open(tmp_path)
