"""What requests may hold; what cannot be honoured is refused by name, never ignored."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from twinmerge.files.strict_json import parse_json
from twinmerge.serve.faults import Fault

NEUTRAL: Mapping[str, Sequence[Any]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Fields of OpenAI's that nothing here can honour, and the values under which they ask for nothing."""
WITHOUT_EFFECT = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "user"})
"""Fields that say nothing about the answer."""

_COLDEST = 0.01
"""Below, probabilities are beyond what numbers hold."""


def _sound(text: str) -> str:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("must be text; half of a surrogate pair is none")
    return text


def _warm(temperature: float) -> float:
    if 0 < temperature < _COLDEST:
        raise ValueError(f"must be 0, which takes the likeliest token, or {_COLDEST} and more")
    return temperature


Text = Annotated[str, AfterValidator(_sound)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Weight = Annotated[float, Field(strict=True, ge=-100, le=100)]


class Body(BaseModel):
    """A request's JSON."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TwinField(Body):
    """Who answers, where the request says so itself."""

    gate: dict[str, Weight] | None = None
    expert: str | None = None


class Asking(Body):
    """What all requests hold."""

    model: str
    twin: TwinField = TwinField()


class StreamOptions(Body):
    """What a stream tells at its end."""

    include_usage: bool = False


class Written(Asking):
    """What requests for texts hold."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2), AfterValidator(_warm)] = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=16)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end a text."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in given if stop)


class Part(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """What was said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1)]
    name: str | None = None


class Chat(Written):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class Completion(Written):
    """A request to /v1/completions."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=64)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def prompts(self) -> list[str]:
        """One or several."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class Inputs(Asking):
    """A request to /classify, /v1/route or /v1/embeddings."""

    input: Text | Annotated[list[Text], Field(min_length=1, max_length=2048)]
    text_pair: Text | Annotated[list[Text], Field(min_length=1, max_length=2048)] | None = None

    @property
    def rows(self) -> list[dict[str, str]]:
        """As `predict` takes them; of pictures `input` holds data URIs."""
        texts = [self.input] if isinstance(self.input, str) else self.input
        if self.text_pair is None:
            return [{"text": text} for text in texts]
        pairs = [self.text_pair] if isinstance(self.text_pair, str) else self.text_pair
        if len(pairs) != len(texts):
            raise Fault(400, f"text_pair must hold one text an input, found {len(pairs)} for {len(texts)}")
        return [{"text": text, "text_pair": pair} for text, pair in zip(texts, pairs, strict=True)]


class Embedding(Inputs):
    """A request to /v1/embeddings."""

    encoding_format: Literal["float", "base64"] = "float"


Kind = TypeVar("Kind", bound=Body)


def read_body(kind: type[Kind], raw: bytes) -> Kind:
    """A request's JSON as what its route takes.

    Raises:
        Fault: 400, naming the field and what it must hold.
    """
    try:
        content = parse_json(raw, finite=True)
    except ValueError as error:
        raise Fault(400, f"the body must be JSON: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise Fault(400, f"the body must be a JSON object, found {type(content).__name__}")
    for name in [name for name in content if name in NEUTRAL or name in WITHOUT_EFFECT]:
        value = content.pop(name)
        if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
            raise Fault(400, f"{name} cannot be honoured here; leave it out", param=name)
    content = {name: value for name, value in content.items() if value is not None}
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        steps = [str(part) for part in first["loc"]]
        where = ".".join(step for step in steps if step != "str" and not {"[", "("} & {*step})  # forms of a union
        known = f"; this route knows {', '.join(kind.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise Fault(400, f"{where}: {first['msg'].removeprefix('Value error, ')}{known}", param=where) from error
