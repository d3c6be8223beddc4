"""Knows when merging the weights for one gate pays, and keeps merged weights, bounded in bytes.

The cost model, in tokens of extra work. Merging a matrix (out, in) at rank r takes r * in * out multiplications, the
low-rank part r * (in + out) a token, so merging costs what `in * out / (in + out)` tokens cost, summed over a model's
matrices. A call costs its tokens and, for the launches of its small products, `CALL_TOKENS` more. Weights are merged
once a gate's calls, past ones and the one at hand, have cost as much: never more than twice the best that foresight
could do. A batch of different gates is never merged unless it is asked for.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor

from twinmerge.runtime.layers import GatedLinear

CALL_TOKENS = 16
"""Measured on CPU: what a call's extra launches cost, in tokens."""
_GATES_REMEMBERED = 1024

Gate = tuple[float, ...]


class MergeCache:
    """Merged weights of the gates used last."""

    def __init__(self, layers: Mapping[str, GatedLinear], limit_bytes: int) -> None:
        """An empty cache.

        Args:
            layers: whose weights are merged.
            limit_bytes: what all merged weights may take together; least recently used go first.
        """
        self.layers = layers
        self.limit_bytes = limit_bytes
        self._merged: OrderedDict[Gate, dict[int, Tensor]] = OrderedDict()
        self._spent: OrderedDict[Gate, float] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def set_bytes(self) -> int:
        """Bytes of one gate's merged weights."""
        return sum(layer.shared.weight.nbytes for layer in self.layers.values())

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(weight.nbytes for merged in self._merged.values() for weight in merged.values())

    @property
    def break_even_tokens(self) -> float:
        """Tokens of extra work that merging costs."""
        shapes: list[tuple[int, int, int]] = [
            (layer.ranks.total, *layer.shared.weight.shape) for layer in self.layers.values()
        ]
        return sum(r * a * b for r, a, b in shapes) / max(1, sum(r * (a + b) for r, a, b in shapes))

    def pays(self, gate: Gate, tokens: int, calls: int = 1) -> bool:
        """Whether merged weights are there, or are worth making, for so many tokens in so many calls."""
        with self._lock:
            if gate in self._merged:
                return True
            if self.set_bytes > self.limit_bytes:
                return False
            spent = self._spent.pop(gate, 0.0) + tokens + CALL_TOKENS * calls
            self._spent[gate] = spent
            if len(self._spent) > _GATES_REMEMBERED:
                self._spent.popitem(last=False)
        return spent >= self.break_even_tokens

    def weights(self, gate: Gate, row: Tensor) -> Mapping[int, Tensor]:
        """The merged weights of a gate, by the layer's id; made if they are not there, kept if they fit.

        Args:
            gate: the key.
            row: the same gate, (expert,).
        """
        with self._lock:
            if gate in self._merged:
                self._merged.move_to_end(gate)
                return self._merged[gate]
            while self._merged and self.nbytes + self.set_bytes > self.limit_bytes:
                self._merged.popitem(last=False)
            merged = {id(layer): layer.merged_weight(row) for layer in self.layers.values()}
            if self.set_bytes <= self.limit_bytes:
                self._merged[gate] = merged
            return merged

    def clear(self) -> None:
        """Forget everything, such as after weights moved to another device or dtype."""
        with self._lock:
            self._merged.clear()
            self._spent.clear()
