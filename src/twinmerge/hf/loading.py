"""Makes transformers models of model folders; no Python of a folder is run."""

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from twinmerge.errors import ArtifactError, MismatchError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.strict_json import read_json
from twinmerge.models.compatible import VOCABULARY_FILES

LOCAL: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""For every `from_pretrained`: nothing is fetched, no Python of a folder is run, nobody is asked on the terminal."""
_TOKENIZER = ("*.model", "*.spm", "*.tiktoken", "*.jinja", "*token*.json", "vocab.*", "merges.txt", "chat_*.json")
_CODE = (
    "its class is Python code of the folder, which is never run here; save the model with a class that transformers "
    "has, and without auto_map"
)


def load_config(folder: Path) -> PretrainedConfig:
    """A model folder's config.

    Raises:
        MismatchError: if there is none, or of a type unknown to transformers.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, **LOCAL)
        return config
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise _unusable(folder, "config.json", error) from error


def _unusable(folder: Path, file: str, error: Exception) -> MismatchError:
    """Why transformers does not take a folder's file, in one line."""
    if "auto_map" in (read_json(folder / file) if (folder / file).is_file() else {}):
        return MismatchError(f"{folder}: by auto_map in {file} {_CODE}")
    return MismatchError(f"{folder} must be a transformers model folder: {str(error).splitlines()[0]}")


def model_class(config: PretrainedConfig, where: Path | str, cls: str | None = None) -> type[PreTrainedModel]:
    """A class, or the one that config.json names.

    Raises:
        MismatchError: if it names none, or one that transformers does not have.
    """
    names = [cls] if cls else config.architectures or []
    found = getattr(transformers, names[0], None) if names else None
    if found is None and getattr(config, "auto_map", None):
        raise MismatchError(f"{where}: by auto_map in config.json {_CODE}")
    if found is None:
        raise MismatchError(
            f"{where}: config.json must name a transformers class in architectures, found {names or 'none'}"
        )
    loaded: type[PreTrainedModel] = found
    return loaded


def load_tokenizer(folder: Path, like: Path | None = None) -> Any:
    """The folder's tokenizer, None if it has none; one without a padding token pads with its end token.

    Args:
        folder: with the tokenizer's files.
        like: a model folder whose config.json says the kind of tokenizer, where the folder has none.

    Raises:
        MismatchError: if transformers has no such tokenizer, or its files are damaged.
    """
    if not any((folder / file).is_file() for file in ("tokenizer_config.json", *VOCABULARY_FILES)):
        return None
    config = load_config(like) if like is not None and not (folder / "config.json").is_file() else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL, **({} if config is None else {"config": config}))
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(folder, "tokenizer_config.json", error) from error
    except Exception as error:  # what the tokenizers library raises of a damaged file has no class of its own
        if type(error) not in (Exception, TypeError, AttributeError):
            raise
        raise MismatchError(f"{folder}: its tokenizer cannot be read: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_files(folder: Path) -> list[Path]:
    """What a tokenizer is stored in."""
    return sorted({path for pattern in _TOKENIZER for path in folder.glob(pattern)})


def tokenizer_bytes(folder: Path) -> dict[str, bytes]:
    """The content of each, by name."""
    return {path.name: path.read_bytes() for path in tokenizer_files(folder)}


def load_backbone(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model folder's model in eval mode; every parameter must be found.

    Args:
        folder: with the weights.
        dtype: of weights and computation; None keeps the stored one.
    """
    config = load_config(folder)
    cls: Any = model_class(config, folder)
    with quiet():
        form = options(cls, config, Checkpoint.open(folder).specs)
        model, info = cls.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True, **form, **LOCAL)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ArtifactError(f"{folder} lacks {len(missing)} parameters of {cls.__name__}, first {missing[0]!r}")
    loaded: PreTrainedModel = model.eval()
    return loaded


@contextmanager
def quiet() -> Iterator[None]:
    """Load or save without transformers' own progress bars and notes; the user's settings return afterwards."""
    # transformers' own functions for this have no types
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def backbone_from(base: Checkpoint, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model of a checkpoint's class, for as many tokens as its config says, with weights by the class's names."""
    config, said = load_config(base.path), base.config
    if (count := said.get("text_config", said).get("vocab_size")) is not None:
        config.get_text_config().vocab_size = count
    return model_from(model_class(config, base.path, said["architectures"][0]), config, state)


def model_from(cls: type[PreTrainedModel], config: PretrainedConfig, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model of a class with weights by its own names.

    Raises:
        ArtifactError: if the class has other weights.
    """
    like = next(v for v in state.values() if v.is_floating_point())
    make: Any = cls._from_config  # what from_pretrained calls: buffers keep the dtype they need
    model = make(copy.deepcopy(config), dtype=like.dtype, **options(cls, config, state)).to(like.device)
    tied = dict(getattr(model, "all_tied_weights_keys", {}))
    other = {name: tied[name] for name in state if tied.get(name, name) not in state}  # the class ties the other way
    state = {other.get(name, name): value for name, value in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    lost = [name for name in missing if name not in tied]
    odd = lost + [name for name in unexpected if state[name].is_floating_point()]  # integers are buffers of older files
    if odd:
        raise ArtifactError(f"{cls.__name__} does not take the twin's weights: {odd[0]!r}")
    built: PreTrainedModel = model.eval()
    return built


def without_weights(folder: Path, cls: str | None = None, names: Iterable[str] | None = None) -> PreTrainedModel:
    """A model without weights.

    Args:
        folder: with its config.json.
        cls: its class; None is the one that the config names.
        names: of the tensors that there are: a pooler is made if one is among them, where the class leaves a choice.
    """
    config = load_config(folder)
    made: Any = model_class(config, folder, cls)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = made(config, **options(made, config, names))
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise MismatchError(f"{folder}: no {made.__name__} can be made of its config.json: {error}") from error
    return model


@torch.no_grad()
def skeleton(folder: Path, cls: str | None = None, names: Iterable[str] | None = None) -> PreTrainedModel:
    """A folder's model in float32 that runs and takes next to no memory: weights are zeros that no page holds.

    The first rows of each are small numbers, so that layers can be told apart; buffers have their values. Arguments
    are those of `without_weights`.
    """
    model = without_weights(folder, cls, names)
    made: dict[int, nn.Parameter] = {}
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in made:
                zeros = torch.from_numpy(np.zeros(parameter.shape, np.float32))
                first = zeros[:4] if zeros.ndim > 1 else zeros
                first.copy_(0.1 * torch.randn(first.shape, generator=generator) + (zeros.ndim < 2))
                made[id(parameter)] = nn.Parameter(zeros, requires_grad=False)
                made[id(parameter)]._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' own mark
            if parameter is not None:
                module._parameters[leaf] = made[id(parameter)]
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = torch.zeros_like(buffer, device="cpu")
    with torch.random.fork_rng(devices=[]):
        model.initialize_weights()  # type: ignore[no-untyped-call]
    ready: PreTrainedModel = model.eval()  # type: ignore[no-untyped-call]
    return ready


def options(cls: Any, config: PretrainedConfig, names: Iterable[str] | None) -> dict[str, Any]:
    """What a class must be told to have the tensors that there are."""
    if names is None or "add_pooling_layer" not in inspect.signature(cls).parameters or _with_pooler(names):
        return {}
    with torch.device("meta"):
        return {"add_pooling_layer": False} if _with_pooler(cls(config).state_dict()) else {}


def _with_pooler(names: Iterable[str]) -> bool:
    return any("pooler" in name.split(".") for name in names)
