"""Says or refuses what differs between a base and its fine-tunes before their weights are mixed."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import CheckpointError, MismatchError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.hashes import sha256_of
from twinmerge.files.strict_json import read_json
from twinmerge.tensors.difference import require_finite

RELATED_COSINE = 0.5
_IMPLAUSIBLE = 1e4
"""How many times larger than the base's largest value (or 1) no value of a fine-tune is."""
_ENTRIES_COMPARED, _MATRICES_COMPARED = 1 << 17, 12

VOCABULARY_FILES = "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model"
HARMLESS = frozenset(
    (
        *("_name_or_path", "_attn_implementation", "architectures", "bos_token_id", "classifier_dropout", "dtype"),
        *("eos_token_id", "finetuning_task", "gradient_checkpointing", "id2label", "label2id", "num_labels"),
        *("output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "tokenizer_class"),
        *("torch_dtype", "transformers_version", "use_cache"),
        "vocab_size",  # the tables' shapes are compared
    )
)
"""Keys of config.json that change neither what a weight means nor how the layers compute."""
_ROPE_LEFT_OUT = {"rope_theta": 10000.0, "rope_scaling": None}
"""What models with rope take where config.json does not say."""
_QUANTISED = {"qweight", "absmax", "SCB", "weight_scale", "weight_scale_inv", "weight_packed", "W_q"}
"""What tensors of a quantised layer are called: GPTQ and AWQ, bitsandbytes, FP8, compressed-tensors, HQQ."""


@dataclass(frozen=True)
class Allow:
    """Differences that the caller takes responsibility for."""

    unrelated: bool = False
    config: bool = False
    vocabulary: bool = False


def compare_tensors(reference: Checkpoint, name: str, other: Checkpoint) -> None:
    """Refuse a model whose tensors are not those of the reference; buffers of integers may be left out or added.

    Raises:
        MismatchError: if a tensor is missing, extra or of another shape.
    """
    ours, theirs = _floats(reference), _floats(other)
    if missing := [tensor for tensor in ours if tensor not in theirs]:
        raise MismatchError(
            f"{name!r} lacks {len(missing)} of {len(ours)} tensors, first {missing[0]!r}; "
            "was it fine-tuned from the same base?"
        )
    if extra := [tensor for tensor in theirs if tensor not in ours]:
        raise MismatchError(
            f"{name!r} has {len(extra)} tensors that {reference.path} lacks, first {extra[0]!r}; "
            "was it fine-tuned from the same base?"
        )
    for tensor, spec in other.specs.items():
        if tensor in reference.specs and spec.shape != reference.specs[tensor].shape:
            raise MismatchError(
                f"{name!r}: {tensor!r} has shape {list(spec.shape)}, {reference.path} has "
                f"{list(reference.specs[tensor].shape)}; resize it or leave the model out"
            )


def compare_configs(reference: Checkpoint, name: str, other: Checkpoint, allow: Allow) -> Iterator[str]:
    """Say or refuse what differs in two config.json; rope, epsilons and activations change what weights mean.

    Yields:
        A line for every difference that was allowed.

    Raises:
        MismatchError: naming the keys and both values.
    """
    if not reference.config or not other.config:
        return
    differences = [
        f"{key} is {ours!r} in {reference.path.name} and {theirs!r} in {other.path.name}"
        for key, ours, theirs in _differences(reference.config, _of_type(other.config, reference.config))
    ]
    if differences and not allow.config:
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise MismatchError(
            f"{name!r} is another model: {differences[0]}{more}; --allow-config-differences merges all the same"
        )
    yield from (f"{name!r}: {difference}" for difference in differences)


def compare_dtypes(reference: Checkpoint, name: str, other: Checkpoint, stored: Mapping[str, str]) -> Iterator[str]:
    """Say which tensors of a model are stored in another dtype than the reference's; they are merged all the same.

    Args:
        reference: the base.
        name: of the model, for the note.
        other: the model.
        stored: the base's name for a tensor -> the model's.
    """
    mixed = [n for n, own in stored.items() if reference.specs[n].dtype != other.specs[own].dtype]
    if mixed:
        first, theirs, ours = mixed[0], other.specs[stored[mixed[0]]].dtype, reference.specs[mixed[0]].dtype
        yield (
            f"{name!r} stores {len(mixed)} tensors in another dtype, first {first!r}: {theirs}, {ours} in "
            f"{reference.path.name}"
        ).replace("torch.", "")


def compare_vocabularies(
    reference: Path, name: str, other: Path, allow: Allow, *, may_add: bool = False
) -> Iterator[str]:
    """Say or refuse tokenizers that give a token another id; a row of the embedding would mean two things.

    Args:
        reference: folder of the base.
        name: of the model, for the message.
        other: its folder.
        allow: whether a difference is said only.
        may_add: whether a model may know more tokens than the base.

    Yields:
        A line for every difference that was allowed.

    Raises:
        MismatchError: naming the file and the first token.
    """
    for file in VOCABULARY_FILES:
        ours, theirs = reference / file, other / file
        if not ours.is_file() or not theirs.is_file() or sha256_of(ours) == sha256_of(theirs):
            continue
        fact = _vocabulary_difference(ours, theirs, may_add=may_add)
        if fact is None:
            continue
        message = f"{name!r} has another vocabulary: {fact}"
        if not allow.vocabulary:
            raise MismatchError(f"{message}; --allow-vocabulary-differences merges all the same")
        yield message


def require_related(
    base: Checkpoint, name: str, expert: Checkpoint, pairs: Collection[tuple[str, str]], remedy: str = ""
) -> float:
    """Refuse an expert whose matrices do not resemble the base's: it is no fine-tune of it.

    Args:
        base: the base.
        name: of the expert, for the message.
        expert: its weights.
        pairs: names of the same matrix in base and expert; some of them are compared, some entries of each.
        remedy: what else the caller can do, for the message.

    Returns:
        The cosine of the compared entries; 1 where there is nothing to compare.

    Raises:
        MismatchError: with the measured cosine and distance.
        CheckpointError: if what was read holds NaN or Inf.
    """
    chosen = list(pairs)[:: max(1, len(pairs) // _MATRICES_COMPARED)]
    product = norm_base = norm_expert = 0.0
    for of_base, of_expert in chosen:
        count = min(_ENTRIES_COMPARED, base.specs[of_base].numel)
        ours = base.read_flat(of_base, 0, count).double()
        theirs = expert.read_flat(of_expert, 0, count).double()
        require_finite(ours, f"base: {of_base!r} in {base.specs[of_base].file}")
        require_finite(theirs, f"expert {name!r}: {of_expert!r} in {expert.specs[of_expert].file}")
        product += float(ours @ theirs)
        norm_base += float(ours @ ours)
        norm_expert += float(theirs @ theirs)
    if not norm_base or not norm_expert:
        return 1.0
    cosine = product / math.sqrt(norm_base * norm_expert)
    if cosine < RELATED_COSINE:
        distance = math.sqrt(max(norm_base + norm_expert - 2 * product, 0.0) / norm_base)
        raise MismatchError(
            f"expert {name!r} is no fine-tune of this base: the cosine of their matrices must be at least "
            f"{RELATED_COSINE}, found {cosine:.3f} (relative distance {distance:.2f}); "
            f"give the model it was fine-tuned from as base{remedy}"
        )
    return cosine


def require_values(model: Checkpoint) -> None:
    """Refuse weights that are no values to be merged: in a quantised form, or left out of this file.

    Raises:
        MismatchError: naming the form and what to do.
    """
    if empty := [spec for spec in model.specs.values() if spec.shape == (0,) and spec.dtype.is_floating_point]:
        raise MismatchError(
            f"{empty[0].file} holds {len(empty)} tensors without values, first {empty[0].name!r}: DeepSpeed ZeRO-3 "
            "saved their places only; gather the weights (zero_to_fp32.py)"
        )
    settings = model.config.get("quantization_config") or {}
    found = [f"quantization_config of {settings.get('quant_method', 'an unnamed method')} in config.json"] * bool(
        settings
    )
    for name, spec in model.specs.items():
        leaf = name.rpartition(".")[2]
        if leaf in _QUANTISED or leaf.endswith("_blocks") or (leaf == "weight" and not spec.dtype.is_floating_point):
            found.append(f"{name!r} in {spec.file.name}")
    if found:
        raise MismatchError(
            f"{model.path} is quantised ({found[0]}): its numbers are codes, which cannot be merged; give the model "
            "it was quantised from, or load it with transformers, call dequantize() and save it in bfloat16"
        )


def plausible_bound(largest: float) -> float:
    """What no value of a fine-tune goes beyond, where the base's go up to `largest`."""
    return _IMPLAUSIBLE * max(largest, 1.0)


def require_plausible(tensor: Tensor, where: str, start: int = 0, bound: float | None = None) -> float:
    """Refuse NaN, Inf and values out of all proportion, such as a flipped bit of an exponent makes.

    Args:
        tensor: of a model, or a stretch of one.
        where: whose, its name and its file, for the message.
        start: which entry of the tensor the first one is.
        bound: the largest magnitude that is plausible, None for any.

    Returns:
        The largest magnitude.

    Raises:
        CheckpointError: saying what was found where.
    """
    if not tensor.numel():
        return 0.0
    low, high = (float(value) for value in torch.aminmax(tensor if tensor.dtype.itemsize > 1 else tensor.float()))
    largest = max(-low, high)
    if not largest < math.inf:
        require_finite(tensor, f"{where} (from entry {start:,})" if start else where)
    if bound is not None and largest > bound:
        raise CheckpointError(
            f"{where} holds {largest:.3g}, more than {bound:.3g}, {_IMPLAUSIBLE:,.0f} times the largest value of the "
            "base; the file is damaged or no fine-tune of it; --allow-unrelated takes it all the same"
        )
    return largest


def _floats(checkpoint: Checkpoint) -> dict[str, None]:
    return {name: None for name, spec in checkpoint.specs.items() if spec.dtype.is_floating_point}


def _of_type(config: Mapping[str, Any], like: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config, or the one inside it, as of an image model's tower, that is of another's type."""
    kind = like.get("model_type")
    inner = [value for value in config.values() if isinstance(value, dict) and value.get("model_type") == kind]
    return inner[0] if inner and kind not in (None, config.get("model_type")) else config


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Keys, nested ones too, on which two configs disagree; None, False, 0 and the like are one value.

    What a key that is left out stands for is known to its class alone, and newer versions of transformers write out
    more of them: only rope, of which a wrong guess ruins a model, is compared then.
    """
    ours, theirs = ({**_ROPE_LEFT_OUT, **_with_old_rope(config)} for config in (ours, theirs))
    for key in sorted(set(ours) & set(theirs)):
        first, second = ours[key], theirs[key]
        if first == second or not (first or second) or key in HARMLESS or key.endswith(("dropout", "dropout_prob")):
            continue
        if first and second and isinstance(first, dict) and isinstance(second, dict):
            yield from ((f"{key}.{inner}", *values) for inner, *values in _differences(first, second))
        else:
            yield key, first, second


def _with_old_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope as older configs say it: transformers 5 writes `rope_theta` and `rope_scaling` as one `rope_parameters`."""
    new = config.get("rope_parameters")
    if "type" in config and "rope_type" not in config:
        return {**config, "rope_type": config["type"]}
    if not isinstance(new, dict) or "rope_theta" not in new:
        return dict(config)
    scaling = {key: value for key, value in new.items() if key != "rope_theta"}
    scaling = {} if scaling == {"rope_type": "default"} else scaling
    rest = {key: value for key, value in config.items() if key != "rope_parameters"}
    return {**rest, "rope_theta": new["rope_theta"], "rope_scaling": scaling}


def _vocabulary_difference(ours: Path, theirs: Path, *, may_add: bool) -> str | None:
    if ours.suffix != ".json":
        return f"{ours.name} differs"
    first, second = _token_ids(ours), _token_ids(theirs)
    if first == second or (may_add and first.items() <= second.items()):
        return None
    token = min(set(first) ^ set(second) or {token for token in first if first[token] != second[token]})
    return (
        f"token {token!r} is {first.get(token, 'absent')} in {ours} and {second.get(token, 'absent')} in {theirs}, "
        f"{len(first)} and {len(second)} tokens"
    )


def _token_ids(file: Path) -> dict[str, int]:
    """Tokens and ids of a tokenizer.json or vocab.json."""
    content = read_json(file)
    if file.name == "vocab.json":
        return content
    try:
        vocabulary = content.get("model", {}).get("vocab", {})
        if isinstance(vocabulary, list):  # unigram: pairs of token and score, the id is the place
            vocabulary = {entry[0]: place for place, entry in enumerate(vocabulary)}
        return {**vocabulary, **{entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}}
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is no tokenizer of a known form") from error
