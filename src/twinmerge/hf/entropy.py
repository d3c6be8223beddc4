"""Learns the coefficients of a merge by the entropy of what it answers (AdaMerging, arXiv:2310.02575)."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from twinmerge.hf.measurements import Inputs, Subject
from twinmerge.merging.adamerging import AdaMerging, agreeing
from twinmerge.merging.method import Chunk


class Mixture:
    """The merged model under every expert's head, and its coefficients; all task vectors are in memory."""

    def __init__(self, subjects: Sequence[Subject], base: Callable[[str], Tensor], method: AdaMerging) -> None:
        """Take experts apart into a base and task vectors.

        Args:
            subjects: the experts, in float32; their parameters are exchanged for the merged ones.
            base: gives a parameter of the base, by the merge's name.
            method: how to merge.
        """
        self.subjects, self.method = {one.name: one for one in subjects}, method
        parameters = {one.name: _of_backbone(one) for one in subjects}
        self.names = sorted({name for own in parameters.values() for name in own})
        self.base = {name: base(name).to(torch.float32, copy=True) for name in self.names}
        values = {e: {n: p.detach() for n, p in own.items()} for e, own in parameters.items()}
        smallest = method.prepass(lambda: (self._chunk(name, values) for name in self.names))
        self.vectors: dict[str, dict[str, Tensor]] = {name: {} for name in values}
        """By expert and parameter."""
        for name in self.names:
            found = {e: own[name] - self.base[name] for e, own in values.items() if name in own}
            found = agreeing(found, smallest) if method.trimmed else found
            for expert, vector in found.items():
                self.vectors[expert][name] = vector
        self.merged = {name: nn.Parameter(value.clone()) for name, value in self.base.items()}
        for one in subjects:
            one.model.backbone.requires_grad_(False)
            places = {id(value): self.merged[name] for name, value in parameters[one.name].items()}
            for module in one.model.backbone.modules():
                for leaf, value in module._parameters.items():
                    if id(value) in places:
                        module._parameters[leaf] = places[id(value)]
        columns = len(self.names) if method.granularity == "layer" else 1
        self.coefficients = nn.Parameter(torch.full((len(subjects), columns), method.start))
        """(expert in alphabetical order, parameter) or (expert, 1)."""
        self.optimizer = torch.optim.Adam([self.coefficients], lr=method.learning_rate, betas=(0.9, 0.999))

    def _chunk(self, name: str, values: Mapping[str, Mapping[str, Tensor]]) -> Chunk:
        own = {expert: found[name].flatten() for expert, found in values.items() if name in found}
        return Chunk(name, 0, self.base[name].flatten(), own)

    def share(self, row: int, column: int) -> float:
        """An expert's coefficient of a parameter, by their places."""
        return float(self.coefficients.detach()[row, column if self.coefficients.shape[1] > 1 else 0])

    @torch.no_grad()
    def mix(self) -> None:
        """Merge with the coefficients as they are."""
        for column, name in enumerate(self.names):
            value = self.merged[name]
            value.copy_(self.base[name])
            for row, expert in enumerate(sorted(self.vectors)):
                if name in self.vectors[expert]:
                    value.add_(self.vectors[expert][name], alpha=self.share(row, column))

    def entropy(self, expert: str, inputs: Inputs) -> Tensor:
        """The mean entropy of the merged model's answers to a batch, under an expert's head, in nats."""
        found = self.subjects[expert].logits(inputs)
        logits = found if isinstance(found, Tensor) else torch.stack(list(found))
        shares = logits.log_softmax(dim=-1)
        return -(shares.exp() * shares).sum(dim=-1).mean()

    def gradients(self, batches: Mapping[str, Sequence[Inputs]]) -> float:
        """Put the gradient of the summed entropies into the coefficients; says what they sum to.

        The gradient of a coefficient is the inner product of the parameter's gradient with the task vector.
        """
        self.mix()
        total = 0.0
        for value in self.merged.values():
            value.grad = None
        for expert in sorted(batches):
            for inputs in batches[expert]:
                entropy = self.entropy(expert, inputs)
                torch.autograd.backward(entropy)
                total += float(entropy.detach())
        gradient = torch.zeros_like(self.coefficients)
        for column, name in enumerate(self.names):
            for row, expert in enumerate(sorted(self.vectors)):
                reached = self.merged[name].grad
                if reached is not None and name in self.vectors[expert]:
                    place = column if gradient.shape[1] > 1 else 0
                    gradient[row, place] += (reached * self.vectors[expert][name]).sum()
        self.coefficients.grad = gradient
        return total

    def step(self, batches: Mapping[str, Sequence[Inputs]]) -> float:
        """One step of Adam, after which coefficients are in [0, 1]; what the entropies summed to before it."""
        total = self.gradients(batches)
        self.optimizer.step()
        with torch.no_grad():
            self.coefficients.clamp_(0, 1)
        return total

    def learned(self) -> dict[str, dict[str, Tensor]]:
        """By expert and parameter, its coefficient, (1,)."""
        return {
            expert: {
                name: torch.tensor([self.share(row, column)], dtype=torch.float64)
                for column, name in enumerate(self.names)
            }
            for row, expert in enumerate(sorted(self.vectors))
        }

    def state(self) -> dict[str, Tensor]:
        """Coefficients and what Adam keeps of them."""
        own = self.optimizer.state.get(self.coefficients, {})
        kept = {name: own[name] for name in ("exp_avg", "exp_avg_sq", "step") if name in own}
        return {"coefficients": self.coefficients.detach(), **kept}

    def go_on(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave."""
        with torch.no_grad():
            self.coefficients.copy_(state["coefficients"])
        kept = {name: state[name] for name in ("exp_avg", "exp_avg_sq", "step") if name in state}
        if kept:
            self.optimizer.state[self.coefficients] = kept


def _of_backbone(subject: Subject) -> dict[str, nn.Parameter]:
    """An expert's parameters by the merge's names, without a head's: each answers under its own."""
    body = {id(value) for value in subject.model.backbone.base_model.parameters()}
    return {name: value for name, value in subject.parameters.items() if id(value) in body}
