"""Turns a head's output into an answer: label, value, labels, entities, span, embedding or text, by kind of head."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto import modeling_auto as auto

from twinmerge.errors import DataError, MismatchError
from twinmerge.files.rows import Row

Answer = dict[str, Any]
Span = tuple[int | None, int, int]
"""A token's text (0: `text`, 1: `text_pair`, None: neither) and its characters there, the first and after the last."""
THRESHOLD = 0.5
"""A label of several is given from this sigmoid on."""
_LONGEST_SPAN = 15
"""Tokens of an answer to a question, at most, as in transformers' pipeline."""
_OUTSIDE = "O"
"""The label of tokens that are no entity."""


@dataclass(frozen=True)
class Reading:
    """One row as its head saw it.

    Attributes:
        row: the texts.
        output: (num_labels,); (seq, ...) for heads that answer for every token, real ones only; (seq,) ids written.
        config: of the class whose head answered.
        spans: of every token, where `Answers.spans` asks for them.
        pool: makes an embedding of (seq, hidden).
        decode: makes a text of (seq,) ids.
        ends: ids that end a text.
        stops: strings that end it.
        ends_before: strings that end it and are no part of it.
    """

    row: Row
    output: Tensor
    config: PretrainedConfig
    spans: Sequence[Span] = ()
    pool: Callable[[Tensor], Tensor] = field(default=lambda states: states.mean(dim=0))
    decode: Callable[[Tensor], str] = field(default=lambda ids: "")
    ends: Collection[int] = ()
    stops: Sequence[str] = ()
    ends_before: Sequence[str] = ()


@dataclass(frozen=True)
class Answers:
    """How heads of one kind answer.

    Attributes:
        kind: the kind's name.
        fields: of an answer.
        read: gives them.
        spans: whether tokens must be traced back to the characters of the row.
    """

    kind: str
    fields: tuple[str, ...]
    read: Callable[[Reading], Answer]
    spans: bool = False

    @property
    def by_token(self) -> bool:
        """Whether the output has an entry for every token."""
        return self.spans or self.kind == "embedding"


def _label(reading: Reading) -> Answer:
    score, label = reading.output.softmax(dim=-1).max(dim=-1)
    return {"label": label_of(reading.config, int(label)), "score": _rounded(score)}


def _value(reading: Reading) -> Answer:
    values = [_rounded(value) for value in reading.output]
    return {"value": values[0] if len(values) == 1 else values}


def _labels(reading: Reading) -> Answer:
    scores = {label_of(reading.config, index): _rounded(score) for index, score in enumerate(reading.output.sigmoid())}
    given = sorted((label for label in scores if scores[label] > THRESHOLD), key=lambda label: -scores[label])
    return {"labels": [{"label": label, "score": scores[label]} for label in given], "scores": scores}


def _entities(reading: Reading) -> Answer:
    """As transformers' pipeline without aggregation: every token whose label is not `O`."""
    found = []
    for (sequence, start, end), probabilities in zip(reading.spans, reading.output.softmax(dim=-1), strict=True):
        score, index = probabilities.max(dim=-1)
        label = label_of(reading.config, int(index))
        if sequence is not None and label != _OUTSIDE:
            word = reading.row["text"][start:end]
            found.append({"label": label, "score": _rounded(score), "word": word, "start": start, "end": end})
    return {"entities": found}


def _span(reading: Reading) -> Answer:
    """The likeliest stretch of `text_pair`, as transformers' pipeline found it; the first token stands for none."""
    inside = [place for place, (sequence, _, _) in enumerate(reading.spans) if sequence == 1]
    if not inside:
        return {"answer": "", "score": 0.0, "start": 0, "end": 0}
    none = [0] if reading.spans[0][0] is None else []
    starts, ends = reading.output[none + inside].softmax(dim=0)[len(none) :].unbind(dim=1)
    scores = (starts[:, None] * ends[None, :]).triu().tril(_LONGEST_SPAN - 1)
    first, last = divmod(int(scores.argmax()), len(inside))
    start, end = reading.spans[inside[first]][1], reading.spans[inside[last]][2]
    text = reading.row["text_pair"][start:end]
    return {"answer": text, "score": _rounded(scores[first, last]), "start": start, "end": end}


def _embedding(reading: Reading) -> Answer:
    return {"embedding": [round(value, 8) for value in reading.pool(reading.output).tolist()]}


def _continuation(reading: Reading) -> Answer:
    """What was written up to the first end token or string; what follows it only fills the batch."""
    ids = reading.output.tolist()
    end = next((place for place, token in enumerate(ids) if token in reading.ends), None)
    stops = (*reading.stops, *reading.ends_before)
    for place in range(len(ids) if end is None else end) if stops else ():
        text = reading.decode(reading.output[: place + 1])
        if any(stop in text for stop in stops):
            end = place
            break
    text = reading.decode(reading.output if end is None else reading.output[: end + 1])
    text = text[: min((text.find(stop) for stop in reading.ends_before if stop in text), default=len(text))]
    return {"continuation": text, "stop_reason": "length" if end is None else "stop"}


CONTINUATION = Answers("continuation", ("continuation", "stop_reason"), _continuation)
LABEL = Answers("label", ("label", "score"), _label)
VALUE = Answers("value", ("value",), _value)
LABELS = Answers("labels", ("labels", "scores"), _labels)
ENTITIES = Answers("entities", ("entities",), _entities, spans=True)
SPAN = Answers("span", ("answer", "score", "start", "end"), _span, spans=True)
EMBEDDING = Answers("embedding", ("embedding",), _embedding)


_MAPPINGS: Mapping[str, Answers] = {
    "FOR_CAUSAL_LM": CONTINUATION,
    "FOR_SEQ_TO_SEQ_CAUSAL_LM": CONTINUATION,
    "FOR_IMAGE_TEXT_TO_TEXT": CONTINUATION,
    "FOR_SEQUENCE_CLASSIFICATION": LABEL,
    "FOR_IMAGE_CLASSIFICATION": LABEL,
    "FOR_AUDIO_CLASSIFICATION": LABEL,
    "FOR_TOKEN_CLASSIFICATION": ENTITIES,
    "FOR_QUESTION_ANSWERING": SPAN,
    "": EMBEDDING,
}
"""Transformers' auto mappings whose classes answer rows of text, and how; the first that has a class counts."""


def _names(mapping: str) -> set[str]:
    """The classes of an auto mapping, which has several for some types."""
    found = getattr(auto, f"MODEL_{mapping}_MAPPING_NAMES" if mapping else "MODEL_MAPPING_NAMES").values()
    return {name for names in found for name in ([names] if isinstance(names, str) else names)}


def answers_of(config: PretrainedConfig | Mapping[str, Any], whose: str, cls: str | None = None) -> Answers:
    """How models of a config's class answer; no weight is needed.

    Args:
        config: of the model; as it is, or as config.json holds it.
        whose: the expert, for the message.
        cls: the class's name; None takes what the config names.

    Raises:
        MismatchError: if rows of text get no answer from such a class.
    """
    if isinstance(config, Mapping):
        config = AutoConfig.for_model(**config)
    name = cls or (config.architectures or ["model of no named class"])[0]
    found = next((answers for mapping, answers in _MAPPINGS.items() if name in _names(mapping)), None)
    if found is None:
        raise MismatchError(
            f"{whose} is a {name}, which gives rows of text no answer; known are classes for sequence and token "
            "classification, question answering and generation, and encoders without a head"
        )
    if found is not LABEL:
        return found
    if config.problem_type == "multi_label_classification":
        return LABELS
    return VALUE if config.problem_type == "regression" or config.num_labels == 1 else LABEL


def require_texts(answers: Answers, row: Row, where: str) -> None:
    """Refuse a row that lacks the second text which its head needs, or has one that its head does not read.

    Raises:
        DataError: saying what the row must hold.
    """
    if answers is SPAN and "text_pair" not in row:
        raise DataError(f"{where}: to answer a question, text holds the question and text_pair where to look for it")
    if answers is ENTITIES and "text_pair" in row:
        raise DataError(f"{where}: entities are looked for in one text; leave text_pair out, or make it another row")


def label_of(config: PretrainedConfig, index: int) -> str:
    """The name that an expert's own config gives a label, whose key may be a number or its digits."""
    names: Mapping[Any, Any] = config.id2label or {}
    return str(names.get(index, names.get(str(index), f"LABEL_{index}")))


def fields_of(kinds: Iterable[Answers]) -> tuple[str, ...]:
    """The fields that answers of several kinds have besides those of their rows."""
    of_routing = "expert", "gate", "fallback", "confidence", "second", "uncertain"
    return tuple(dict.fromkeys((*of_routing, *(name for answers in kinds for name in answers.fields))))


def _rounded(value: Tensor) -> float:
    return round(float(value), 6)
