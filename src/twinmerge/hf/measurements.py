"""Measures an expert on inputs of its own: Fisher information, and second moments of what its layers read and say."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from twinmerge.errors import MismatchError
from twinmerge.hf.answers import EMBEDDING, ENTITIES, LABELS, SPAN, VALUE, Answers
from twinmerge.hf.heads import answered
from twinmerge.hf.model import TwinModel
from twinmerge.merging.regmean import BY_COLUMN, BY_ROW
from twinmerge.merging.spectra import is_layer
from twinmerge.runtime.layers import form_of
from twinmerge.twin.weighting import LEFT, RIGHT, SIZES

_FLATTENED = 4.0
"""By how much logits are divided before it is asked what their answer hangs on."""

Inputs = Mapping[str, Tensor]
Measure = Callable[["Subject", Sequence[Inputs]], dict[str, Tensor]]


@dataclass(frozen=True)
class Subject:
    """An expert that is measured, whole and in float32."""

    name: str
    model: TwinModel
    """With the expert as its backbone, which has its head, or gives it to the model."""
    answers: Answers
    names: Mapping[str, str]
    """Parameter of the backbone -> what the merge calls it."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that are merged, by the merge's names."""
        own = self.model.backbone.named_parameters()
        return {self.names[name]: value for name, value in own if name in self.names}

    def logits(self, inputs: Inputs) -> Tensor:
        """What the expert says of a batch; see `heads.answered`."""
        if self.name in self.model.heads:
            outputs = self.model.backbone.base_model(**self.model.asked(inputs), return_dict=True)
            return answered(self.model.heads[self.name], outputs, inputs)
        found: Any = self.model.backbone(**inputs)
        if self.answers is EMBEDDING:
            states: Tensor = found[0]
            return states
        logits: Tensor = found.logits if "logits" in found else torch.stack([found.start_logits, found.end_logits], -1)
        return logits


def fisher(subject: Subject, rows: Sequence[Inputs]) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of an expert's parameters (arXiv:2111.09832).

    For every input and class: p(class) (d log p(class) / d theta)^2, summed over classes, averaged over inputs. Each
    input is a batch of its own: squares of a batch's summed gradient would depend on its size.

    Args:
        subject: the expert.
        rows: inputs, a batch of one row each.

    Returns:
        A tensor for each parameter that is merged; zeros where no answer hangs on it.
    """
    parameters = subject.parameters
    sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
    subject.model.backbone.requires_grad_(True)
    for inputs in rows:
        for share, term in _terms(subject.answers, subject.logits(inputs)[0]):
            found = torch.autograd.grad(term, list(parameters.values()), retain_graph=True, allow_unused=True)
            for total, gradient in zip(sums.values(), found, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient, gradient, value=share)
    return {name: total / len(rows) for name, total in sums.items()}


def _terms(answers: Answers, logits: Tensor) -> Iterator[tuple[float, Tensor]]:
    """What is squared of one answer, and its share: log p of each class, by p.

    A value is the mean of a normal distribution of variance 1; each of several labels is given or not by itself, for
    which the sum over both is p (1 - p) (d logit)^2.
    """
    if answers is VALUE:
        yield from ((1.0, value) for value in logits)
    elif answers is LABELS:
        shares = logits.detach().sigmoid()
        yield from ((float(p * (1 - p)), logit) for p, logit in zip(shares, logits, strict=True))
    else:
        each = logits if answers is ENTITIES else logits.T if answers is SPAN else logits[None]
        for distribution in each:
            yield from ((float(log_p.detach().exp()), log_p) for log_p in distribution.log_softmax(dim=-1))


@torch.no_grad()
def grams(subject: Subject, rows: Sequence[Inputs]) -> dict[str, Tensor]:
    """X' X of what every linear layer of an expert reads (arXiv:2212.09849).

    Args:
        subject: the expert.
        rows: inputs, a batch of one row each: nothing is padded.

    Returns:
        An (in, in) tensor for each weight, by its name and which of its axes takes the inputs; zeros where nothing
        reads it.
    """
    modules = [(module, form_of(module)) for module in subject.model.backbone.modules()]
    tied = {id(module.weight) for module, _ in modules if isinstance(module, torch.nn.Embedding)}  # averaged, as read
    merged = {id(value): name for name, value in subject.parameters.items() if id(value) not in tied}
    totals: dict[str, Tensor] = {}
    hooks = []
    for module, form in modules:
        kind = None if form is None else form.kind
        weight: Any = getattr(module, "weight", None)
        name = merged.get(id(weight))
        if name is not None and kind in ("linear", "conv1d") and is_layer(name, tuple(weight.shape)):
            by_column = kind == "linear"
            size = weight.shape[1 if by_column else 0]
            total = totals.setdefault(name + (BY_COLUMN if by_column else BY_ROW), torch.zeros(size, size))
            hooks.append(module.register_forward_pre_hook(_adding_to(total)))
    try:
        for inputs in rows:
            subject.model.backbone(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return totals


def _adding_to(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        read = args[0].flatten(0, -2)
        total.addmm_(read.T, read)

    return add


def moments(
    subject: Subject, rows: Sequence[Inputs], *, gradients: bool, seed: int, most_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """Second moments of what an expert's layers read and of the gradients on what they say (METHOD §3).

    Of an answer the gradient is that of its logits in a random direction, drawn anew for every row, whose second moment
    is what a small change of the logits costs in KL divergence. The inputs' moment is a mean over tokens, the
    gradients' over rows: a layer that sees one token of a row counts for as much as it changes.

    Args:
        subject: the expert; its `names` say of which matrices.
        rows: inputs, a batch of one row each: nothing is padded.
        gradients: measure the gradients too; else the inputs alone.
        seed: of the directions.
        most_bytes: what moments may take at a time; what does not fit is measured in passes of its own.

    Yields:
        By parameter name and side of its matrix as it is stored, (n, n), or (n,) for an embedding's rows; and both
        mean diagonals. A matrix that no row reaches has none.

    Raises:
        MismatchError: if the class gives no gradients.
    """
    subject.model.backbone.requires_grad_(False)
    for layers in _portions(_layers(subject), most_bytes):
        found = {name: _Moments(module, kind) for name, (module, kind) in layers.items()}
        hooks = [
            layer.module.register_forward_hook(layer.hook(gradients), with_kwargs=True) for layer in found.values()
        ]
        generator = torch.Generator().manual_seed(seed)
        try:
            for inputs in rows:
                with torch.set_grad_enabled(gradients):
                    logits = subject.logits(inputs)
                    if gradients:
                        _pass_back(subject, logits * _direction(logits, subject.answers, generator))
        finally:
            for hook in hooks:
                hook.remove()
        yield {
            name + side: tensor
            for name, layer in found.items()
            for side, tensor in layer.sides(len(rows) if gradients else None).items()
        }


def _pass_back(subject: Subject, answer: Tensor) -> None:
    try:
        answer.sum().backward()  # type: ignore[no-untyped-call]  # torch has no types for it
    except RuntimeError as error:  # a class that changes in place what its gradients need, as RWKV
        raise MismatchError(
            f"expert {subject.name!r}: exclusive.weighting: two_sided needs gradients, and "
            f"{type(subject.model.backbone).__name__} gives none ({str(error).split('.')[0]}); use inputs or none"
        ) from error


def _layers(subject: Subject) -> dict[str, tuple[nn.Module, str]]:
    """Layers that have a matrix of their own, with their kind, by the matrix's name."""
    modules = [(module, form_of(module)) for module in subject.model.backbone.modules()]
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module, form in modules:
        weight: Any = getattr(module, "weight", None)
        if form is not None and form.kind in ("linear", "conv1d", "embedding"):
            owners.setdefault(id(weight), []).append((module, form.kind))
    parameters = subject.parameters
    return {name: own[0] for name, value in parameters.items() if len(own := owners.get(id(value), [])) == 1}


def _portions(
    layers: Mapping[str, tuple[nn.Module, str]], most_bytes: int
) -> Iterator[dict[str, tuple[nn.Module, str]]]:
    """Layers whose moments fit together; at least one."""
    portion: dict[str, tuple[nn.Module, str]] = {}
    held = 0
    for name, (module, kind) in layers.items():
        needed = sum(moment.nbytes for moment in _empty(module, kind))
        if portion and held + needed > most_bytes:
            yield portion
            portion, held = {}, 0
        portion[name] = module, kind
        held += needed
    if portion:
        yield portion


def _empty(module: nn.Module, kind: str) -> tuple[Tensor, Tensor]:
    """Moments of the inputs and of the outputs, on no memory."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    read, said = (columns, rows) if kind == "linear" else (rows, columns)
    shape = (read,) if kind == "embedding" else (read, read)
    return torch.empty(shape, device="meta"), torch.empty(said, said, device="meta")


class _Moments:
    """What is summed of one layer."""

    def __init__(self, module: nn.Module, kind: str) -> None:
        self.module, self.kind, self.tokens = module, kind, 0
        self.read, self.said = (torch.zeros_like(moment, device="cpu") for moment in _empty(module, kind))

    def hook(self, gradients: bool) -> Callable[..., Tensor | None]:
        """Of a forward pass: sum what is read, and what comes back."""

        def add(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor | None:
            read = args[0] if args else next(iter(kwargs.values()))
            if self.kind == "embedding":
                self.read += torch.bincount(read.flatten(), minlength=len(self.read))
                self.tokens += read.numel()
            else:
                flat = read.detach().flatten(0, -2)
                self.read.addmm_(flat.T, flat)
                self.tokens += len(flat)
            if not gradients or not torch.is_grad_enabled():  # where a class asks for none, nothing comes back
                return None
            if not output.requires_grad:  # the first layer: nothing before it asks for a gradient
                output = output.detach().requires_grad_().clone()
            output.register_hook(self._came_back)  # type: ignore[no-untyped-call]
            return output

        return add

    def _came_back(self, gradient: Tensor) -> None:
        flat = gradient.flatten(0, -2)
        self.said.addmm_(flat.T, flat)

    def sides(self, rows: int | None) -> dict[str, Tensor]:
        """Means, on the sides of the matrix as it is stored; nothing where no row came by."""
        read = self.read / max(self.tokens, 1)
        said = None if rows is None else self.said / rows
        sizes = [float(_diagonal(moment).mean()) for moment in (read, said) if moment is not None]
        if not all(sizes):
            return {}
        left, right = (said, read) if self.kind == "linear" else (read, said)
        found = {LEFT: left, RIGHT: right, SIZES: torch.tensor(sizes, dtype=torch.float64)}
        return {side: moment for side, moment in found.items() if moment is not None}


def _diagonal(moment: Tensor) -> Tensor:
    return moment if moment.ndim == 1 else moment.diagonal()


def _direction(logits: Tensor, answers: Answers, generator: torch.Generator) -> Tensor:
    """A random direction among an answer's logits, the more in one the more the answer hangs on it.

    Of distributions, its second moment is the Fisher information of the logits, flattened so that an answer that is
    certain counts too.
    """
    drawn = torch.randn(logits.shape, generator=generator)
    if answers in (VALUE, EMBEDDING):
        return drawn
    flat = logits.detach() / _FLATTENED
    if answers is LABELS:
        shares = flat.sigmoid()
        return drawn * (shares * (1 - shares)).sqrt()
    axis = 1 if answers is SPAN else -1
    shares = flat.softmax(dim=axis)
    drawn = drawn * shares.sqrt()
    return drawn - shares * drawn.sum(dim=axis, keepdim=True)


MEASUREMENTS: Mapping[str, Measure] = {"fisher": fisher, "grams": grams}
"""By the name that a method gives."""
