"""Reads a YAML file into a strict model and says on which line it is wrong."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from twinmerge.errors import RecipeError

Lines = dict[tuple[str | int, ...], int]
Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Variant:
    """Beside BaseModel, a base of models that come in forms: a field of the first such class takes any form of it."""

    @classmethod
    def form_of(cls, data: Any) -> type[BaseModel]:
        """The form that data ask for, perhaps from a registry that grows."""
        raise NotImplementedError

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Of the form that is found when data come."""
        if Variant not in cls.__bases__:
            return handler(source)

        def validated(value: Any) -> Any:
            return value if isinstance(value, cls) else cls.form_of(value).model_validate(value)

        return core_schema.no_info_plain_validator_function(validated)


def load_yaml(path: Path, model: type[Model], document: int | None = None) -> Model:
    """Read a YAML file into `model`, refusing what the model does not know.

    Args:
        path: the file.
        model: a pydantic model that forbids extra keys.
        document: which of its documents, counted from 0; None is the only one.

    Returns:
        The validated model.

    Raises:
        RecipeError: if the file is missing, is not YAML, has a key twice or an unknown key, or holds a value out of
            range; the message opens with `file:line`.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    try:
        if document is None:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        else:
            root = list(yaml.compose_all(text, Loader=yaml.SafeLoader))[document]
        if root is not None:
            _refuse_duplicate_keys(root, path)
        data = yaml.safe_load(text) if document is None else list(yaml.safe_load_all(text))[document]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{path}:{line}: not valid YAML: {problem}") from error
    except RecursionError as error:
        raise RecipeError(f"{path}:1: an anchor holds itself") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}:1: must hold keys and values, found {type(data).__name__}")
    lines = dict(_lines(root)) if root is not None else {}
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_explain(error, path, model, data, lines)) from error


def _refuse_duplicate_keys(node: yaml.Node, path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{path}:{line}: keys must be plain words")
            if key.value in seen:
                raise RecipeError(
                    f"{path}:{line}: key {key.value!r} stands twice, first on line {seen[key.value]}; names must differ"
                )
            seen[key.value] = line
            _refuse_duplicate_keys(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_duplicate_keys(value, path)


def _lines(node: yaml.Node, at: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], int]]:
    """Yield the line of every key path."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*at, key.value), key.start_mark.line + 1
            yield from _lines(value, (*at, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*at, index), value.start_mark.line + 1
            yield from _lines(value, (*at, index))


def _explain(error: ValidationError, path: Path, model: type[BaseModel], data: Any, lines: Lines) -> str:
    """Say the first fault of a validation in one line; unknown keys first, they explain the others."""
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    fault = faults[0]
    location, owner = _locate(fault["loc"], model, data)
    line = next((lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in lines), 1)
    where = ".".join(str(part) for part in location)
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if fault["type"] == "extra_forbidden":
        under = f" under {'.'.join(str(part) for part in location[:-1])}" if len(location) > 1 else ""
        close = difflib.get_close_matches(str(location[-1]), owner, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(owner)}"
        return f"{path}:{line}: unknown key {str(location[-1])!r}{under}{hint}"
    if fault["type"] == "union_tag_invalid":
        known = [name.strip("'") for name in fault["ctx"]["expected_tags"].split(", ")]
        return f"{path}:{line}: {where}.method must be {' or '.join(known)}, found {fault['ctx']['tag']!r}{more}"
    if fault["type"] == "union_tag_not_found":
        return f"{path}:{line}: key '{where}.method' is missing{more}"
    if fault["type"] == "missing":
        return f"{path}:{line}: key {where!r} is missing{more}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, found {fault['input']!r}"
    return f"{path}:{line}: {where + ': ' if where else ''}{message}{more}"


def _locate(parts: tuple[str | int, ...], model: type[BaseModel], data: Any) -> tuple[tuple[str | int, ...], list[str]]:
    """Turn pydantic's location into a path of the file, with the keys that its innermost model knows."""
    location: tuple[str | int, ...] = ()
    annotation: Any = model
    known = list(model.model_fields)
    for part in parts:
        models = [m for m in members(annotation) if isinstance(m, type) and issubclass(m, BaseModel)]
        models = [member.form_of(data) if issubclass(member, Variant) else member for member in models]
        if models:
            known = list(models[0].model_fields) if len(models) == 1 else known
            field = next((m.model_fields[str(part)] for m in models if str(part) in m.model_fields), None)
            annotation = field.annotation if field else None
        elif containers := [member for member in members(annotation) if get_origin(member) in (dict, list)]:
            annotation = get_args(containers[0])[-1]
        else:
            continue  # the name of a union's member that is no model
        location = (*location, part)
        data = data.get(part) if isinstance(data, dict) else data[int(part)] if isinstance(data, list) else None
    return location, known


def members(annotation: Any) -> list[Any]:
    """Unfold Annotated and unions into their members."""
    if hasattr(annotation, "__metadata__"):
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is not None and get_origin(annotation) not in (dict, list, tuple):
        return [inner for member in get_args(annotation) for inner in members(member)]
    return [annotation]
