"""Gives tokens that one expert alone has rows of their own, beyond the base's, in every table over the vocabulary."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import MismatchError
from twinmerge.files.checkpoint import Checkpoint, TensorSpec
from twinmerge.files.scratch import scratch
from twinmerge.files.writer import save_tensors
from twinmerge.models.adapter import AdapterExpert
from twinmerge.models.provenance import Recorded
from twinmerge.models.source import Expert

Tokens = Mapping[str, int]
"""What a tokenizer knows, and the ids."""


class Added(Recorded):
    """An expert's own tokens.

    Attributes:
        ids: by which the expert itself knows them, ascending.
        start: the twin's id of the first; the others follow.
        rows: of the expert's own tables.
    """

    ids: list[int]
    start: int
    rows: int

    @property
    def to_twin(self) -> dict[int, int]:
        """The expert's id of each -> the twin's; no number is both."""
        return {own: self.start + place for place, own in enumerate(self.ids)}


class Vocabulary(Recorded):
    """What the rows of a twin's tables are: the base's, some that nobody reads, then each expert's own.

    Attributes:
        base: rows of the base's tables.
        size: rows of the twin's.
        added: by expert; those that have none are left out.
    """

    base: int
    size: int
    added: Mapping[str, Added]

    def own_rows(self, expert: str) -> Tensor:
        """The twin's row of every id that the expert itself knows, (rows,) int64; without its own the base's ids."""
        added = self.added.get(expert)
        if added is None:
            return torch.arange(self.base)
        rows = torch.arange(added.rows)
        rows[added.ids] = torch.arange(added.start, added.start + len(added.ids))
        return rows

    def own_ids(self, ids: Tensor, expert: str) -> Tensor:
        """The twin's ids as the expert itself knows them; those that it does not know are 0."""
        rows = self.own_rows(expert)
        found = torch.zeros(self.size, dtype=torch.int64)
        found[rows] = torch.arange(len(rows))
        return found.to(ids.device)[ids]


def vocabulary_of(
    base: Checkpoint, tables: Sequence[str], experts: Mapping[str, Expert], known: Tokens, theirs: Mapping[str, Tokens]
) -> Vocabulary | None:
    """Which tokens are which expert's own; None if no expert has any.

    A token is an expert's own if its tokenizer knows it and the base's does not, whether or not the base has a row for
    its id; so is every row that the base lacks.

    Args:
        base: what the shared expert is made of.
        tables: its tensors that have a row for every token.
        experts: matched with it; their tables may have more rows.
        known: the base's tokens.
        theirs: tokens of the experts whose tokenizer is another, which knows all of the base's.

    Raises:
        MismatchError: if an expert's tables differ in size, or lack the row of a token.
    """
    present = [table for table in tables if table in base.specs]
    if not present:
        return None
    size = base.specs[present[0]].shape[0]
    found: dict[str, tuple[list[int], int]] = {}
    for name, expert in sorted(experts.items()):
        stored = {t: expert.checkpoint.specs[expert.stored[t]].shape[0] for t in present if t in expert.stored}
        rows = max(stored.values(), default=size)
        if short := [t for t in present if stored.get(t, size) != rows]:
            raise MismatchError(
                f"expert {name!r}: every table over the vocabulary must have {rows} rows, found "
                f"{stored.get(short[0], size)} in {short[0]!r}; save it after resize_token_embeddings"
            )
        new = {token: place for token, place in theirs.get(name, {}).items() if token not in known}
        if homeless := sorted(token for token, place in new.items() if place >= rows):
            raise MismatchError(
                f"expert {name!r}: its tokenizer knows {homeless[0]!r} as {new[homeless[0]]}, but its tables have "
                f"{rows} rows; save it after resize_token_embeddings, or take the token out of its tokenizer"
            )
        if ids := sorted({*new.values(), *range(size, rows)}):
            found[name] = ids, rows
    if not found:
        return None
    start, added = max(rows for _, rows in found.values()), {}
    for name, (ids, rows) in found.items():
        added[name] = Added(ids=ids, start=start, rows=rows)
        start += len(ids)
    return Vocabulary(base=size, size=start, added=added)


def widened(
    base: Checkpoint, tables: Sequence[str], experts: Mapping[str, Expert], vocabulary: Vocabulary
) -> tuple[Checkpoint, dict[str, Expert]]:
    """Base and experts with rows for the tokens of all experts; an expert moves none but its own.

    Tables are written anew, one at a time, into files that are gone when the program ends; everything else stays where
    it is.

    Args:
        base: as for `vocabulary_of`.
        tables: as there.
        experts: as there.
        vocabulary: what it found.

    Returns:
        The base with the added rows of every expert, so that no merge changes them, and the experts.
    """
    present = [table for table in tables if table in base.specs]
    wide: dict[str, dict[str, Tensor]] = {name: {} for name in experts}
    wide_base: dict[str, Tensor] = {}
    for table in present:
        value = base.read(table)
        rows = torch.zeros(vocabulary.size, *value.shape[1:], dtype=value.dtype)
        rows[: vocabulary.base] = value
        own = {n: e.checkpoint.read(e.stored[table]) for n, e in experts.items() if table in e.stored}
        for name, added in vocabulary.added.items():
            rows[list(added.to_twin.values())] = own.get(name, value)[added.ids].to(value.dtype)
        wide_base[table] = rows
        for name, table_of in own.items():
            wide[name][experts[name].stored[table]] = _as_twin(table_of, rows, vocabulary, name)
    changed = {}
    for name, expert in experts.items():
        tensors = wide[name] | (_pairs(expert, present, vocabulary) if isinstance(expert, AdapterExpert) else {})
        changed[name] = replace(expert, checkpoint=_with(expert.checkpoint, tensors))
    found = _with(base, wide_base)
    return replace(found, config=_config(base.config, vocabulary.size)), changed


def _as_twin(own: Tensor, shared: Tensor, vocabulary: Vocabulary, name: str) -> Tensor:
    """An expert's table in the twin's order: the base's rows as it moved them, its own tokens', others' as shared."""
    rows = shared.to(own.dtype, copy=True)
    rows[: vocabulary.base] = own[: vocabulary.base]
    if (added := vocabulary.added.get(name)) is not None:
        rows[list(added.to_twin.values())] = own[added.ids]
        within = [place for place in added.ids if place < vocabulary.base]
        rows[within] = shared[within].to(own.dtype)
    return rows


def _pairs(expert: AdapterExpert, tables: Sequence[str], vocabulary: Vocabulary) -> dict[str, Tensor]:
    """The tensors of pairs that change tables, with zeros where tokens are added."""
    found = {}
    for table in tables:
        if (pair := expert.pairs.get(table)) is None:
            continue
        stored, axis = (pair.a, 1) if pair.transposed else (pair.b, 0)
        value = expert.checkpoint.read(stored)
        shape = list(value.shape)
        shape[axis] = vocabulary.size - shape[axis]
        found[stored] = torch.cat([value, value.new_zeros(shape)], dim=axis)
    return found


def _with(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """A checkpoint some of whose tensors are these, read from files of their own."""
    if not tensors:
        return checkpoint
    folder, specs = scratch(sum(value.nbytes for value in tensors.values())), dict(checkpoint.specs)
    for count, (name, value) in enumerate(tensors.items()):
        file = folder / f"{count}.safetensors"
        save_tensors({name: value}, file)
        del specs[name]  # so that the first of all stays one of the model's own files
        specs[name] = _only(file)
    return replace(checkpoint, specs=specs)


def _only(file: Any) -> TensorSpec:
    return next(iter(Checkpoint.open(file).specs.values()))


def _config(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A config.json for so many tokens."""
    found = {**config, "vocab_size": size} if "vocab_size" in config else dict(config)
    if "vocab_size" in found.get("text_config", {}):
        found["text_config"] = {**found["text_config"], "vocab_size": size}
    return found
