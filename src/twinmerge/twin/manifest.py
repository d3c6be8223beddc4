"""What twin.json says, typed: the recipe, what was read and kept of it, the router, and the hash of every file."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field, FiniteFloat, NonNegativeInt, ValidationError, model_validator

from twinmerge.errors import ArtifactError
from twinmerge.files.hashes import sha256_of
from twinmerge.files.strict_json import parse_json
from twinmerge.models.provenance import FileRecord, InputRecord, Recorded, Sha256, portable
from twinmerge.models.vocabulary import Vocabulary
from twinmerge.twin.plan import Kind
from twinmerge.twin.recipe import EXPERT_NAME, Recipe

FORMAT_VERSION = 1
MANIFEST = "twin.json"


def _inside(name: str) -> str:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError("a file must lie in the twin's folder")
    return name


ExpertName = Annotated[str, Field(pattern=f"^{EXPERT_NAME}$")]
FileName = Annotated[str, AfterValidator(_inside)]


class SourceRecord(Recorded):
    """Where an expert and its router data were."""

    model: str
    router_data: str | None = None


class ExclusiveRecord(Recorded):
    """How much exclusive knowledge was asked for; the other settings are kept as they are."""

    compression: str = "svd"


class RouterSettingsRecord(Recorded):
    """How inputs find their experts; the other settings are kept as they are."""

    method: str
    features: str


class RecipeRecord(Recorded):
    """The recipe of a twin, so far as a twin's user needs it: a method that is not installed here is no obstacle."""

    base: str
    experts: Mapping[ExpertName, SourceRecord]
    shared: Mapping[str, Any]
    exclusive: ExclusiveRecord
    router: RouterSettingsRecord | None = None
    max_length: int | None = None
    seed: int = 0


class ExpertRecord(InputRecord):
    """An expert: what it was read from, and what is kept of it.

    Attributes:
        adapter: whether it was a LoRA adapter.
        energy: ||expert - shared||_F^2 of all that is kept of it in part or whole.
        energy_kept: the share of it that is kept.
        energy_left_out: how much of `energy` the recipe leaves to the shared expert.
        rank_mean: of its matrices.
        rank_max: of its matrices.
    """

    adapter: bool
    energy: FiniteFloat
    energy_kept: FiniteFloat
    energy_left_out: FiniteFloat = 0.0
    rank_mean: FiniteFloat
    rank_max: NonNegativeInt


class ParameterRecord(Recorded):
    """A parameter: what its layer is, the scaling of its merge, and the rank that is kept of each expert."""

    kind: Kind
    scaling: FiniteFloat | None = None
    ranks: Mapping[ExpertName, NonNegativeInt] = {}


class ConfusedRecord(Recorded):
    """Two experts that are hard to tell apart: the share of the first's inputs sent to the second, and back."""

    experts: Annotated[list[ExpertName], Field(min_length=2, max_length=2)]
    shares: Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)]


class RouterRecord(Recorded):
    """What the router gives on inputs that were held out.

    Attributes:
        precision: of matrix products in the passes it was fitted on; None where it looked at none.
    """

    accuracy: FiniteFloat
    calibration_error: FiniteFloat
    temperature: FiniteFloat
    inputs_per_expert: NonNegativeInt
    confused: list[ConfusedRecord] = []
    precision: str | None = None


class ChangeRecord(Recorded):
    """An expert that came, went or was exchanged."""

    at: str
    change: str
    expert: str
    versions: Mapping[str, str] = {}


class AgreementRecord(Recorded):
    """How far a one-hot gate is from its expert, and what compression predicts."""

    distance: FiniteFloat
    predicted: FiniteFloat


class CheckRecord(Recorded):
    """What trying the twin found before it was published: relative distances, and the experts' agreements."""

    rows: NonNegativeInt
    forward: FiniteFloat | None = None
    alone: FiniteFloat | None = None
    cached: FiniteFloat | None = None
    experts: Mapping[ExpertName, AgreementRecord] = {}


class HashedFile(FileRecord):
    """A file of the twin."""

    sha256: Sha256


class Manifest(Recorded):
    """What twin.json says.

    Attributes:
        format_version: of the folder.
        created: when.
        recipe: what it was built from.
        root: where the recipe's paths start, seen from the twin's folder; None if that would not stay the same
            elsewhere.
        versions: of what computed it.
        base: the pre-trained model.
        experts: by name, in the gate's order.
        tensors: by name of the parameter.
        vocabulary: where experts have tokens of their own, what the rows of the shared expert's tables are.
        fallback: parameters that go by the exact fall-back; None in older twins, where loading finds out.
        router: what it gives; None if there is none, or it is yet to be fitted.
        notes: differences that were allowed, and what is unusual.
        changes: experts that came and went since it was built.
        check: what trying it found; None if it was not tried.
        files: every other file.
    """

    format_version: int = FORMAT_VERSION
    created: str
    recipe: RecipeRecord
    root: str | None = None
    versions: Mapping[str, str]
    base: InputRecord
    experts: Mapping[ExpertName, ExpertRecord]
    tensors: Mapping[str, ParameterRecord]
    vocabulary: Vocabulary | None = None
    fallback: list[str] | None = None
    router: RouterRecord | None = None
    notes: list[str] = []
    changes: list[ChangeRecord] = []
    check: CheckRecord | None = None
    files: Mapping[FileName, HashedFile] = {}

    @model_validator(mode="after")
    def _same_experts(self) -> "Manifest":
        names = list(self.experts)
        if names != sorted(self.recipe.experts):
            raise ValueError(f"experts must be those of recipe.experts in alphabetical order, found {', '.join(names)}")
        ranked = {expert for tensor in self.tensors.values() for expert in tensor.ranks}
        ranked |= set(self.vocabulary.added) if self.vocabulary else set()
        if strangers := sorted(ranked - set(names)):
            raise ValueError(f"tensors or vocabulary name expert {strangers[0]!r}, which experts does not")
        return self

    @property
    def inputs(self) -> dict[str, InputRecord]:
        """Everything that it was made from: `base`, and the experts by name."""
        return {"base": self.base, **self.experts}


def read_manifest(folder: Path) -> Manifest:
    """Read twin.json of a twin's folder.

    Raises:
        ArtifactError: if there is none, it is of another format version, or damaged; naming the file and the key.
    """
    file = folder / MANIFEST
    try:
        content = parse_json(file.read_bytes(), finite=True)
    except OSError as error:
        raise ArtifactError(
            f"{folder} is no twin: {MANIFEST} cannot be read ({error.strerror}); build one first"
        ) from error
    except ValueError as error:
        raise ArtifactError(f"{file} is damaged: {error}; copy or build the twin again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ArtifactError(f"{file}: format_version must be {FORMAT_VERSION}, found {version!r}; rebuild the twin")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise ArtifactError(f"{file} is damaged: {_explain(error)}; copy or build the twin again") from error


def write_manifest(folder: Path, manifest: Manifest, known: Mapping[str, HashedFile] = {}) -> None:
    """Write twin.json, last: what is described, plus bytes and sha256 of every other file.

    Args:
        folder: the twin's, with all its files.
        manifest: what is described.
        known: entries of files that were hashed already.
    """
    files = {name: known.get(name) or _hashed(folder / name) for name in sorted(files_in(folder) - {MANIFEST})}
    content = manifest.model_copy(update={"format_version": FORMAT_VERSION, "files": files}).content()
    (folder / MANIFEST).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def record_recipe(recipe: Recipe) -> RecipeRecord:
    """A recipe as a manifest keeps it: sources as another machine may read them."""
    content = recipe.model_dump(mode="json", exclude={"root"})
    content["base"] = portable(recipe.root, recipe.base)
    content["experts"] = {
        name: {
            key: value if key in ("labels", "class") else portable(recipe.root, value) for key, value in said.items()
        }
        for name, source in recipe.experts.items()
        if (said := source.model_dump(exclude_none=True))
    }
    if files := content["shared"].get("calibration_data"):
        content["shared"]["calibration_data"] = {name: portable(recipe.root, file) for name, file in files.items()}
    return RecipeRecord.model_validate(content)


def record_root(recipe: Recipe, twin: Path) -> str | None:
    """Where a recipe's paths start, seen from a twin's folder; None if the two have no folder in common."""
    root = recipe.root.resolve()
    seen = portable(twin, root)
    return None if seen == root.name else seen


def files_in(folder: Path) -> set[str]:
    """Names of all files, as the manifest writes them."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _hashed(file: Path) -> HashedFile:
    return HashedFile(bytes=file.stat().st_size, sha256=sha256_of(file))


def _explain(error: ValidationError) -> str:
    """The first fault in one line: key, what must hold, what was found."""
    fault = error.errors()[0]
    key = ".".join(str(part) for part in fault["loc"] if part != "[key]")
    if fault["type"] == "missing":
        return f"key {key!r} is missing"
    if fault["type"] == "value_error":
        return f"{key + ': ' if key else ''}{fault['msg'].removeprefix('Value error, ')}"
    found = repr(fault["input"])
    message = fault["msg"].replace("Input should", "must").replace("String should", "must")
    return f"{key!r} {message[0].lower()}{message[1:]}, found {found if len(found) <= 60 else found[:57] + '...'}"
