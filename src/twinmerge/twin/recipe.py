"""Knows what a build is made of: the recipe, its defaults, and where its paths lead."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from twinmerge.errors import DataError, RecipeError
from twinmerge.files.schema import Strict, load_yaml
from twinmerge.files.tables import RowFile
from twinmerge.merging.average import Average
from twinmerge.merging.method import Method
from twinmerge.models.source import locate
from twinmerge.twin.features import Features, FeaturesField, Layers

DEFAULT_BUDGET = 0.06
EXPERT_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"


class ExpertSource(Strict):
    """Where an expert's weights are, inputs that belong to it, and what its folder may not say.

    Attributes:
        model: folder or hub id of a full fine-tune or a PEFT adapter.
        router_data: inputs that belong to it, as `RowFile.parse` takes them; needed with a router.
        labels: names of its head's classes, in their order; without it those of its config.json.
        head: folder or safetensors file with the tensors of its head, which its adapter lacks.
        cls: the transformers class that it is, which its adapter or config.json does not name.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    model: str
    router_data: str | None = None
    labels: list[str] | None = None
    head: str | None = None
    cls: Annotated[str | None, Field(alias="class")] = None


class ExclusiveSettings(Strict):
    """How much of the exclusive knowledge is kept (METHOD §3); one of rank, energy, budget, or a sparse density.

    Attributes:
        rank: singular directions of every matrix; beyond a matrix's smaller side it is kept whole.
        energy: share of ||expert - shared||_F^2 kept in every matrix, (0, 1].
        budget: bytes of all exclusive parts of all experts, as a multiple of the base's bytes.
        density: fraction of entries kept by `magnitude` and `random`, (0, 1].
        embeddings: compress the embeddings' differences too, or leave them to the shared expert.
        bn: running statistics of BatchNorm: `per_expert`, each expert's own, whole; `shared`, those merged;
            `recalibrate`, each expert's and the shared expert's, estimated anew on router data through their weights as
            the twin keeps them. `auto` is recalibrate under a budget, where every expert has 100 inputs or more; else
            per_expert.
        compression: `svd` (factors), `magnitude` (largest entries) or `random` (rescaled random entries).
        dtype: what exclusive parts are stored in; null is the base's. 16 bits double the ranks that a budget holds,
            float8_e4m3fn doubles them again, int4 once more (both factors only; 1-D parts are then stored in float16).
            A budget takes int4 if no dtype is named.
        weighting: what `svd` weighs a matrix's directions by: `none`; `inputs`, how much a layer's inputs use them;
            `two_sided`, also how much the answers hang on the outputs. Measured on router data through each whole
            expert, in float32 and, for the outputs, with gradients. `auto` is two_sided under a budget, where an expert
            takes at most 1 GB so and is no encoder-decoder; else none.
        weighting_rows: inputs of each expert that are measured, at most.
    """

    rank: Annotated[int, Field(ge=0, strict=True)] | None = None
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    budget: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    embeddings: Literal["exclusive", "shared"] = "shared"
    bn: Literal["auto", "per_expert", "shared", "recalibrate"] = "auto"
    compression: Literal["svd", "magnitude", "random"] = "svd"
    dtype: Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "int4"] | None = None
    weighting: Literal["auto", "none", "inputs", "two_sided"] = "auto"
    weighting_rows: Annotated[int, Field(ge=1, strict=True)] = 100

    @model_validator(mode="before")
    @classmethod
    def _default_budget(cls, data: object) -> object:
        if isinstance(data, dict) and data.get("compression", "svd") == "svd":
            given = [key for key in ("rank", "energy", "budget") if data.get(key) is not None]
            if not given and data.get("density") is None:
                given, data = ["budget"], {**data, "budget": DEFAULT_BUDGET}
            if given == ["budget"] and "dtype" not in data:
                return {**data, "dtype": "int4"}
        return data

    @model_validator(mode="after")
    def _one_policy(self) -> "ExclusiveSettings":
        given = [key for key in ("rank", "energy", "budget", "density") if getattr(self, key) is not None]
        wanted = "one of rank, energy, budget" if self.compression == "svd" else "density"
        if len(given) != 1 or (given == ["density"]) == (self.compression == "svd"):
            raise ValueError(f"compression {self.compression} takes {wanted}, found {' and '.join(given) or 'none'}")
        if self.dtype in ("float8_e4m3fn", "int4") and self.compression != "svd":
            raise ValueError(f"dtype {self.dtype} is for factors, compression svd, found {self.compression}")
        weighed = self.weighting in ("inputs", "two_sided")
        if weighed and (self.compression != "svd" or self.energy is not None):
            found = "energy" if self.compression == "svd" else self.compression
            raise ValueError(
                f"weighting {self.weighting} is for factors that a rank or a budget chooses, found {found}"
            )
        return self


class RouterSettings(Strict):
    """How inputs find their experts (METHOD §4).

    Attributes:
        method: `linear` (multinomial logistic regression) or `mlp` (the paper's network) are trained; `centroid` and
            `knn` need no training.
        features: which hidden states of the shared expert are averaged over the tokens: `last`, `all`, `embeddings`,
            `layer:K` or `layers:[...]` (0 = embeddings, K = after layer K), concatenated; `tokens`: n-grams of token
            ids, which cost no pass; `...+tokens`: both; `cascade`: tokens decide, only uncertain inputs take
            `all+tokens`; `speculative`: an input runs under the expert that tokens say, `all+tokens` of that very pass
            say whether it was right, and only those inputs run again where it was not.
        gate: `soft` mixes experts by their probabilities, as the paper; `top_k` the likeliest few; `groups` mixes those
            of one group, the likeliest, of experts that are hard to tell apart; `hard` takes one, and is what
            `speculative` needs. Not given, it is `hard` for `speculative` and `soft` for other features.
        top_k: experts that a `top_k` gate mixes.
        samples_per_expert: inputs used of each expert, at most, drawn from all it has; each costs a pass. Experts with
            fewer count as much as the others.
        held_out: share of them that selects the epoch, the regularisation, the temperature and the fall-back distance.
        epochs: passes over the inputs (`mlp`).
        learning_rate: of AdamW (`mlp`).
        neighbours: the k of `knn`.
        fallback: quantile of the held-out inputs' strangeness beyond which an input is left to the shared expert; null
            switches the fall-back off.
        detector: what is strange: `distance` to the nearest expert of the hidden states (or the share of unknown
            n-grams); `energy`: router logits that are low for every expert; `both`, each in units of its spread.
    """

    method: Literal["linear", "mlp", "centroid", "knn"] = "linear"
    features: FeaturesField = Features(Layers("all"), tokens=True, form="speculative")
    gate: Literal["soft", "top_k", "groups", "hard"] = "hard"
    top_k: Annotated[int, Field(ge=1, strict=True)] = 2
    samples_per_expert: Annotated[int, Field(ge=2, strict=True)] = 5000
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    epochs: Annotated[int, Field(ge=1, strict=True)] = 10
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5e-4
    neighbours: Annotated[int, Field(ge=1, strict=True)] = 10
    fallback: Annotated[float, Field(gt=0.5, le=1)] | None = 0.999
    detector: Literal["distance", "energy", "both"] = "both"

    @model_validator(mode="before")
    @classmethod
    def _that_fit_together(cls, data: object) -> object:
        """What is not given follows from what is: one expert a row for speculative features, mixed ones for others."""
        if not isinstance(data, dict):
            return data
        if "features" not in data and data.get("gate", "hard") != "hard":
            return {**data, "features": "all+tokens"}
        guesses = str(data.get("features", "speculative")) == "speculative"
        return {"gate": "hard" if guesses else "soft", **data}

    @model_validator(mode="after")
    def _gate_of_one_expert(self) -> "RouterSettings":
        if self.features.form == "speculative" and self.gate != "hard":
            raise ValueError(
                f"features speculative answer from a pass under one expert: gate must be hard, found {self.gate}"
            )
        return self


class Recipe(Strict):
    """What a twin is built from; see docs/recipe.md.

    Attributes:
        base: folder or hub id of the pre-trained model.
        experts: the models fine-tuned from it, by name; at least two.
        shared: how the shared expert is merged.
        exclusive: how much exclusive knowledge is kept.
        router: how inputs find their experts; `none`, or null, if every call says gate or expert.
        max_length: tokens an input is cut at; null takes what the experts were trained on, else what the base allows.
        seed: of everything random.
        root: folder that relative paths start from (the recipe's own).
    """

    base: str
    experts: dict[str, ExpertSource]
    shared: Method = Average()
    exclusive: ExclusiveSettings = ExclusiveSettings()
    router: RouterSettings | None = RouterSettings()
    max_length: Annotated[int, Field(ge=1, strict=True)] | None = None
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    root: Path = Path()

    @field_validator("router", mode="before")
    @classmethod
    def _no_router(cls, router: object) -> object:
        return None if router == "none" else router

    @model_validator(mode="after")
    def _inputs_for_the_router(self) -> "Recipe":
        lacking = [name for name, source in self.experts.items() if source.router_data is None]
        if lacking and self.router is not None:
            raise ValueError(
                f"experts.{lacking[0]}.router_data is missing: the router learns from inputs of every expert; name a "
                "file of them, or say router: none and give gate or expert with every call"
            )
        return self

    @property
    def router_files(self) -> dict[str, RowFile]:
        """Where the inputs of experts are, of those that have some.

        Raises:
            RecipeError: if one is not there, or cannot be fetched.
        """
        sources = {name: source.router_data for name, source in self.experts.items()}
        return {n: self.rows(words, f"experts.{n}.router_data") for n, words in sources.items() if words is not None}

    def rows(self, words: str, key: str) -> RowFile:
        """Where rows are that the recipe names.

        Args:
            words: as `RowFile.parse` takes them.
            key: where the recipe says it, for the message.

        Raises:
            RecipeError: if they are not there, or cannot be fetched.
        """
        try:
            found = RowFile.parse(words, self.root)
        except DataError as error:
            raise RecipeError(f"{key}: {error}") from error
        if not found.path.exists():
            raise RecipeError(f"{key}: no file or folder {found.path}; paths start from the recipe's folder")
        return RowFile(found.path.resolve(), found.columns)

    @field_validator("experts")
    @classmethod
    def _two_named_experts(cls, experts: dict[str, ExpertSource]) -> dict[str, ExpertSource]:
        if len(experts) < 2:
            raise ValueError(f"a twin needs at least two experts, found {len(experts)}")
        for name in experts:
            if not re.fullmatch(EXPERT_NAME, name) or name == "shared":
                raise ValueError(f"an expert's name is letters, digits, '_', '.', '-' and not 'shared', found {name!r}")
        if len({name.lower() for name in experts}) < len(experts):
            raise ValueError("experts' names must differ in more than case: each becomes a folder")
        return experts

    @classmethod
    def load(cls, path: Path | str) -> "Recipe":
        """Read a recipe file; relative paths in it start from its folder.

        Raises:
            RecipeError: `file:line`, what is wrong and what to do.
        """
        path = Path(path)
        return load_yaml(path, cls).model_copy(update={"root": path.resolve().parent})

    def locate(self, source: str, key: str) -> Path:
        """Find a model folder: beside the recipe, absolute, or on the hub.

        Args:
            source: what the recipe says.
            key: where the recipe says it, for the message.

        Raises:
            RecipeError: if it is neither a path that exists nor a hub id that can be fetched.
        """
        return locate(self.root, source, key)
