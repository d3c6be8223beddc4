"""Parses what a router looks at, `all+tokens` in a recipe, into typed values; nothing else reads the words."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import PlainSerializer, PlainValidator

from twinmerge.errors import MismatchError

_NUMBERS = re.compile(r"layer:(\d+)|layers:\[\s*(\d+(?:\s*,\s*\d+)*)\s*\]")


@dataclass(frozen=True)
class Layers:
    """Which of a model's hidden states are averaged over the tokens; several are put side by side.

    Attributes:
        chosen: places: 0 is the embeddings, K what leaves layer K; or `all` of them; or `last`, the model's output.
    """

    chosen: tuple[int, ...] | Literal["all", "last"]

    def among(self, count: int) -> list[int]:
        """The places among so many hidden states, embeddings counted.

        Raises:
            MismatchError: if there is no such place.
        """
        if not isinstance(self.chosen, tuple):
            return list(range(count))[0 if self.chosen == "all" else -1 :]
        beyond = [place for place in self.chosen if place >= count]
        if beyond:
            raise MismatchError(f"router.features: layer {beyond[0]} must be at most {count - 1}, the model's last")
        return list(self.chosen)

    def __str__(self) -> str:
        if not isinstance(self.chosen, tuple):
            return self.chosen
        if len(self.chosen) == 1:
            return f"layer:{self.chosen[0]}" if self.chosen[0] else "embeddings"
        return f"layers:[{','.join(map(str, self.chosen))}]"


_NAMED = {"last": Layers("last"), "all": Layers("all"), "embeddings": Layers((0,))}


@dataclass(frozen=True)
class Features:
    """What a router looks at.

    Attributes:
        layers: hidden states; None for none.
        tokens: whether token ids count too.
        form: `sum`: everything at once; `cascade`: tokens first, hidden states where tokens are not certain;
            `speculative`: tokens first, hidden states of the pass under the expert that tokens say.
    """

    layers: Layers | None
    tokens: bool = False
    form: Literal["sum", "cascade", "speculative"] = "sum"

    @classmethod
    def parse(cls, words: object) -> "Features":
        """Read what a recipe says.

        Raises:
            ValueError: if it is none of the known forms.

        Example:
            >>> Features.parse("layers:[0, 2]+tokens")
            Features(layers=Layers(chosen=(0, 2)), tokens=True, form='sum')
        """
        if isinstance(words, Features):
            return words
        if words == "tokens":
            return cls(None, tokens=True)
        if words == "cascade" or words == "speculative":
            return cls(Layers("all"), tokens=True, form=words)
        hidden = str(words).removesuffix("+tokens")
        numbers = _NUMBERS.fullmatch(hidden)
        if hidden in _NAMED:
            layers = _NAMED[hidden]
        elif numbers:
            layers = Layers(tuple(int(number) for number in (numbers[1] or numbers[2]).split(",")))
        else:
            raise ValueError(
                "must be last, all, embeddings, layer:K or layers:[...], each alone or with +tokens, or tokens, "
                f"cascade or speculative, found {words!r}"
            )
        return cls(layers, tokens=hidden != words)

    def __str__(self) -> str:
        if self.form != "sum":
            return self.form
        return "+".join([*([] if self.layers is None else [str(self.layers)]), *(["tokens"] if self.tokens else [])])


FeaturesField = Annotated[Features, PlainValidator(Features.parse), PlainSerializer(str, return_type=str)]
"""A field that is words in YAML and JSON, and typed in code."""
