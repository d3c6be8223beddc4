"""Keeps what an expert has of its own beside weights: how it reads texts, writes texts and pools hidden states."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from twinmerge.errors import MismatchError
from twinmerge.files.strict_json import read_json
from twinmerge.hf.answers import CONTINUATION, EMBEDDING, Answers
from twinmerge.hf.images import PROCESSOR, load_processor
from twinmerge.hf.loading import load_config, load_tokenizer, quiet, tokenizer_bytes, tokenizer_files
from twinmerge.hf.vocabulary import renumbered, with_twin_ids
from twinmerge.models.vocabulary import Added

OWN = "own"
"""Where a twin keeps it, in `experts/NAME`: files by the names that transformers and sentence-transformers know."""
GENERATION = "generation_config.json"
_MODULES, _PROMPTS, _READING = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
_SENTENCE = (_MODULES, _PROMPTS, _READING)
_LONGEST = 10**6
"""Lengths beyond are no lengths."""
_WAYS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls_token": lambda states, places: states[0],
    "max_tokens": lambda states, places: states.amax(dim=0),
    "mean_tokens": lambda states, places: states.mean(dim=0),
    "mean_sqrt_len_tokens": lambda states, places: states.sum(dim=0) / len(states) ** 0.5,
    "weightedmean_tokens": lambda states, places: places @ states / places.sum(),
    "lasttoken": lambda states, places: states[-1],
}
"""Sentence-transformers' ways to pool (seq, hidden), places counted from 1, in the order in which they are joined."""


@dataclass(frozen=True)
class Own:
    """What an expert has of its own; what is None or empty is as the base has it.

    Attributes:
        tokenizer: reads other tokens than the base's would.
        processor: prepares images otherwise than the base's would.
        lower_case: whether texts are lower-cased before.
        prompt: stands before every text.
        generation: how texts are written, end tokens among it.
        pooled: the ways, of `_WAYS`, in which hidden states become an embedding.
        normalized: whether it has length 1.
    """

    tokenizer: Any = None
    lower_case: bool = False
    prompt: str = ""
    generation: GenerationConfig | None = None
    pooled: tuple[str, ...] = ("mean_tokens",)
    normalized: bool = False
    processor: Any = None

    @classmethod
    def read(cls, folder: Path, base: Path, whose: str = "an expert", added: Added | None = None) -> "Own":
        """What `files_of` said to keep, by the twin's ids; nothing, if the folder is not there.

        Args:
            folder: where it is kept.
            base: of the twin.
            whose: for messages.
            added: tokens that the expert alone has.

        Raises:
            MismatchError: if an embedding is made in a way that is not known here.
        """
        generation = load_generation(folder) if (folder / GENERATION).is_file() else None
        tokenizer = load_tokenizer(folder, base) if folder.is_dir() else None
        return cls(
            renumbered(tokenizer, added),
            generation=with_twin_ids(generation, added),
            processor=load_processor(folder),
            **_sentence(folder, whose),
        )

    @property
    def reads(self) -> bool:
        """Whether inputs are read otherwise than the base reads them."""
        return self.tokenizer is not None or self.processor is not None or self.lower_case or bool(self.prompt)

    def pool(self, states: Tensor) -> Tensor:
        """The embedding of (seq, hidden), real tokens only."""
        places = torch.arange(1, len(states) + 1, dtype=states.dtype, device=states.device)
        joined = torch.cat([_WAYS[way](states, places) for way in self.pooled])
        return nn.functional.normalize(joined, dim=0) if self.normalized else joined


def files_of(
    name: str, folder: Path, base: Path, ours: Any, answers: Answers, *, other_vocabulary: bool
) -> dict[str, bytes]:
    """What is kept of an expert's folder, since the base's does not say the same: file -> content.

    What the folder of an adapter does not say is the base's.

    Args:
        name: of the expert, for messages.
        folder: of the expert.
        base: folder of what it was fine-tuned from.
        ours: the base's tokenizer; None if it reads no texts.
        answers: how it answers.
        other_vocabulary: take a tokenizer that gives tokens other ids.

    Raises:
        MismatchError: if something differs that one expert cannot have alone.
    """
    kept = _own_processor(folder, base) if ours is None else []
    adapter = (folder / "adapter_config.json").is_file() or not (folder / "config.json").is_file()
    alike = ours is None or tokenizer_bytes(folder) == tokenizer_bytes(base)
    theirs = ours if alike else load_tokenizer(folder, base)
    if theirs is not None and _behaviour(ours) != _behaviour(theirs):
        if not other_vocabulary:
            _require_vocabulary(name, ours, theirs)
        kept += tokenizer_files(folder)
    if answers.spans and ours is not None and not (theirs or ours).is_fast:
        raise MismatchError(f"expert {name!r}: {answers.kind} need a fast tokenizer; save one with tokenizer.json")
    source = base if adapter and not (folder / _MODULES).is_file() else folder
    if answers is EMBEDDING and _sentence(source, f"expert {name!r}"):
        kept += [path for file in _SENTENCE if (path := source / file).is_file()]
        kept += source.glob("*_*/config.json")
    roots = {path: folder if path.is_relative_to(folder) else base for path in kept}
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path, root in roots.items()}
    if answers is CONTINUATION and (generation := _own_generation(folder, base, ours, theirs, adapter=adapter)):
        files[GENERATION] = (json.dumps(generation, indent=1, sort_keys=True) + "\n").encode()
    return files


def load_generation(folder: Path) -> GenerationConfig:
    """How a model folder writes texts, as transformers loads it."""
    with quiet():
        if (folder / GENERATION).is_file():
            return GenerationConfig.from_pretrained(folder, local_files_only=True)
        return GenerationConfig.from_model_config(load_config(folder))


def trained_length(*folders: Path) -> int | None:
    """Tokens that inputs were cut at in training, by the first folder whose tokenizer says so."""
    keys = {"tokenizer.json": "truncation", _READING: "max_seq_length", "tokenizer_config.json": "model_max_length"}
    for folder in folders:
        said = [read_json(folder / file).get(key) for file, key in keys.items() if (folder / file).is_file()]
        lengths = [length["max_length"] if isinstance(length, dict) else length for length in said]
        if known := [int(length) for length in lengths if length and 0 < length < _LONGEST]:
            return min(known)
    return None


def bring_own(source: Path, folder: Path) -> None:
    """Put what a twin kept of an expert into the folder of a model, in the place of what is the base's."""
    replaced = tokenizer_files(folder) if any(source.glob("tokenizer*")) else []
    for path in (*replaced, *(folder / file for file in _SENTENCE)):
        path.unlink(missing_ok=True)
    if source.is_dir():
        shutil.copytree(source, folder, dirs_exist_ok=True)


def _behaviour(tokenizer: Any) -> dict[str, Any]:
    """All that decides what a text becomes: normaliser, post-processor, special tokens, template, sides."""
    names = ("special_tokens_map", "chat_template", "model_input_names", "truncation_side", "padding_side", "is_fast")
    found: dict[str, Any] = {name: getattr(tokenizer, name, None) for name in names}
    if tokenizer.is_fast:
        return {**found, **json.loads(tokenizer.backend_tokenizer.to_str()), "truncation": None, "padding": None}
    return found | {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}


def _require_vocabulary(name: str, ours: Any, theirs: Any) -> None:
    """Each of the base's tokens must have the same id, or one row of the embedding would mean two things."""
    first, second = ours.get_vocab(), theirs.get_vocab()
    if other := [token for token in first if first[token] != second.get(token)]:
        raise MismatchError(
            f"{name!r} has another vocabulary: token {min(other)!r} is {first[min(other)]} in "
            f"{ours.name_or_path} and {second.get(min(other), 'absent')} in {theirs.name_or_path}; "
            "--allow-vocabulary-differences merges all the same"
        )


def _own_generation(folder: Path, base: Path, ours: Any, theirs: Any, *, adapter: bool) -> dict[str, Any]:
    """An expert's settings, none if they are the base's.

    An adapter without any writes as the base, up to the end token of its own tokenizer too.
    """
    left_out = ("transformers_version", "_from_model_config")
    first = {key: value for key, value in load_generation(base).to_diff_dict().items() if key not in left_out}
    if not adapter or (folder / GENERATION).is_file():
        second = {key: value for key, value in load_generation(folder).to_diff_dict().items() if key not in left_out}
        return second if second != first else {}
    if theirs is None or theirs.eos_token_id in (None, ours.eos_token_id):
        return {}
    ends = first.get("eos_token_id") or []
    return first | {"eos_token_id": [*(ends if isinstance(ends, list) else [ends]), theirs.eos_token_id]}


def _sentence(folder: Path, whose: str) -> dict[str, Any]:
    """How a folder of sentence-transformers reads and pools, as fields of `Own`; nothing of another folder."""
    if not (folder / _MODULES).is_file():
        return {}
    found: dict[str, Any] = {}
    for module in json.loads((folder / _MODULES).read_text(encoding="utf-8")):
        kind, path = module["type"].rpartition(".")[2], folder / module.get("path", "")
        if kind == "Pooling":
            settings = read_json(path / "config.json")
            said = settings.get("pooling_mode") or [way for way in _WAYS if settings.get(f"pooling_mode_{way}")]
            said = [said] if isinstance(said, str) else said
            ways = tuple(
                way for way in _WAYS if {way, way.removesuffix("_token"), way.removesuffix("_tokens")} & {*said}
            )
            known = ways and len(ways) == len(said) and settings.get("include_prompt", True)
            found["pooled"], kind = ways, kind if known else f"{kind} of another form"
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise MismatchError(
                f"{whose} ends in a {kind} ({path.name}/), which a twin does not apply; of sentence-transformers' "
                "modules it applies Pooling and Normalize"
            )
        found |= {"normalized": True} if kind == "Normalize" else {}
    prompts, reading = (read_json(folder / f) if (folder / f).is_file() else {} for f in (_PROMPTS, _READING))
    prompt = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name"), "")
    return found | {"lower_case": bool(reading.get("do_lower_case")), "prompt": prompt}


def _own_processor(folder: Path, base: Path) -> list[Path]:
    """The file by which an expert prepares images otherwise than the base."""
    if not (folder / PROCESSOR).is_file():
        return []
    ours, theirs = (read_json(at / PROCESSOR) if (at / PROCESSOR).is_file() else {} for at in (base, folder))
    names = ("image_processor_type", "feature_extractor_type", "processor_class")  # which change with the version
    same = all(ours.get(key) == theirs.get(key) for key in {*ours, *theirs} - {*names})
    return [] if same else [folder / PROCESSOR]
