"""Keeps what was merged for one gate, bounded in bytes, and says for which calls merging pays.

The cost model, in tokens of extra work. Merging a matrix (out, in) at rank r takes r * in * out multiplications, the
low-rank part r * (in + out) a token, so merging costs what `in * out / (in + out)` tokens cost, summed over a model's
matrices. A call costs its tokens and, for the launches of its small products, `CALL_TOKENS` more. Whether a call is
answered by merged weights depends on that call alone, never on what was asked before: merged and factored weights round
differently, and an answer's bits are its own. A batch of different gates is never merged unless it is asked for.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from twinmerge.runtime.layers import GatedLinear

CALL_TOKENS = 16
"""Measured on CPU: what a call's extra launches cost, in tokens."""

Gate = tuple[float, ...]


class MergeCache:
    """What was merged for the gates used last; it saves work and changes no answer."""

    def __init__(self, layers: Mapping[str, GatedLinear], limit_bytes: int) -> None:
        """An empty cache.

        Args:
            layers: whose weights are merged, by name.
            limit_bytes: what all that is kept may take together; least recently used go first.
        """
        self.layers = layers
        self.limit_bytes = limit_bytes
        self._kept: OrderedDict[object, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        """A copy starts empty."""
        return MergeCache, (self.layers, self.limit_bytes)

    @property
    def set_bytes(self) -> int:
        """Bytes of one gate's merged weights."""
        return sum(layer.shared.weight.nbytes for layer in self.layers.values())

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(size for _, size in self._kept.values())

    @property
    def break_even_tokens(self) -> float:
        """Tokens of extra work that merging costs."""
        shapes: list[tuple[int, int, int]] = [
            (layer.ranks.total, *layer.shared.weight.shape) for layer in self.layers.values()
        ]
        return sum(r * a * b for r, a, b in shapes) / max(1, sum(r * (a + b) for r, a, b in shapes))

    def pays(self, tokens: int, calls: int = 1) -> bool:
        """Whether merged weights are worth making for so many tokens in so many calls."""
        fits = 0 < self.set_bytes <= self.limit_bytes
        return fits and tokens + CALL_TOKENS * calls >= self.break_even_tokens

    def weights(self, gate: Gate, row: Tensor) -> Mapping[str, Tensor]:
        """The merged weights of a gate, by the layer's name.

        Args:
            gate: the key.
            row: the same gate, (expert,).
        """
        merged: Mapping[str, Tensor] = self.kept(
            ("weights", gate),
            lambda: {name: layer.merged_weight(row) for name, layer in self.layers.items()},
            self.set_bytes,
        )
        return merged

    def kept(self, key: object, make: Callable[[], Any], size_bytes: int) -> Any:
        """What belongs to a key; made if it is not there, kept if it fits."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
            made = make()
            if size_bytes <= self.limit_bytes:
                while self._kept and self.nbytes + size_bytes > self.limit_bytes:
                    self._kept.popitem(last=False)
                self._kept[key] = made, size_bytes
            return made

    def clear(self) -> None:
        """Forget everything, such as after weights moved to another device or dtype."""
        with self._lock:
            self._kept.clear()
