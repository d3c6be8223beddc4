"""Scores inputs by their token ids: tf-idf weighted n-grams under a logistic regression; costs no forward pass."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from twinmerge.errors import DataError, GateError
from twinmerge.routing.calibrate import cross_entropy
from twinmerge.routing.router import Batch, Examples, Scorer
from twinmerge.twin.recipe import RouterSettings

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

PADDING = -1
_INPUTS_PER_NGRAM = 2
_MOST_NGRAMS = 50_000
_INVERSE_PENALTIES = (1.0, 10.0, 100.0)
_SHIFT = 2**24  # beyond any vocabulary: a bigram's key never meets a token's


def token_ids(inputs: Mapping[str, Tensor]) -> Tensor:
    """The real tokens of a batch.

    Args:
        inputs: input_ids (batch, seq) and, where rows are padded, attention_mask.

    Returns:
        (batch, seq) int64, `PADDING` where there is none.

    Raises:
        GateError: if there are no input_ids.
    """
    if "input_ids" not in inputs:
        raise GateError(f"a router that looks at tokens needs input_ids, found {', '.join(sorted(inputs))}")
    ids = inputs["input_ids"].long()
    mask = inputs.get("attention_mask")
    return ids if mask is None else ids.masked_fill(mask == 0, PADDING)


def stack_ids(rows: Sequence[Tensor]) -> Tensor:
    """(seq,) ids of many inputs as one (row, seq) tensor, padded."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=PADDING)


class NgramHead(nn.Module):
    """Router logits from tokens and pairs of neighbouring tokens; costs no forward pass (METHOD §4).

    An n-gram counts if at least two of the router's inputs hold it. An input is the vector of 1 + log(count), times the
    n-gram's inverse document frequency, at length 1.
    """

    keys: Tensor
    idf: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, experts: int, ngrams: int = 0) -> None:
        """Make an untrained head for so many n-grams."""
        super().__init__()
        self.inverse_penalty = _INVERSE_PENALTIES[0]
        self.register_buffer("keys", torch.zeros(ngrams, dtype=torch.int64))
        self.register_buffer("idf", torch.zeros(ngrams))
        self.register_buffer("weight", torch.zeros(ngrams, experts, dtype=torch.float16))
        self.register_buffer("bias", torch.zeros(experts))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Look at a batch.

        Args:
            ids: (batch, seq) as `token_ids` gives them.

        Returns:
            Logits (batch, expert), float32; and (batch,) the share of each input's n-grams that the head never saw.
        """
        row, column, value, unseen = self._vectors(ids)
        logits = self.bias.expand(len(ids), -1).clone()
        return logits.index_add_(0, row, self.weight[column].float() * value[:, None]), unseen

    def fit(self, training: Examples, held_out: Examples) -> None:
        """Choose n-grams and fit; the strength of the regularisation has the lowest held-out loss.

        Raises:
            DataError: if no two inputs have an n-gram in common.
        """
        self._choose_ngrams(training.batch.ids)
        if not len(self.keys):
            raise DataError("router.features asks for tokens, but no token occurs in two inputs of the router data")
        best_loss = float("inf")
        for inverse_penalty in _INVERSE_PENALTIES:
            candidate = NgramHead(len(self.bias), len(self.keys))
            candidate.keys, candidate.idf = self.keys, self.idf
            candidate._regress(training, inverse_penalty)
            loss = float(cross_entropy(candidate(held_out.batch.ids)[0], held_out.labels, held_out.weights))
            if loss < best_loss:
                best_loss, best, self.inverse_penalty = loss, candidate, inverse_penalty
        self.weight, self.bias = best.weight, best.bias

    def refit(self, everything: Examples) -> None:
        """Choose n-grams and fit once more, at the regularisation that `fit` chose."""
        self._choose_ngrams(everything.batch.ids)
        self._regress(everything, self.inverse_penalty)

    def _regress(self, examples: Examples, inverse_penalty: float) -> None:
        from sklearn.linear_model import LogisticRegression

        regression = LogisticRegression(C=inverse_penalty, max_iter=300)
        vectors, weights = self._sparse(examples.batch.ids), examples.weights.double().numpy()
        found = regression.fit(vectors, examples.labels.numpy(), sample_weight=weights)
        coefficients, bias = found.coef_, found.intercept_
        if len(self.bias) == 2:  # scikit-learn keeps one row for two classes
            coefficients, bias = np.concatenate([-coefficients, coefficients]) / 2, np.append(-bias, bias) / 2
        self.weight = torch.from_numpy(coefficients.T.copy()).half()
        self.bias = torch.from_numpy(bias).float()

    def _choose_ngrams(self, ids: Tensor) -> None:
        """Keep n-grams of at least two inputs, the most frequent ones if they are very many."""
        row, key = _ngrams(ids)
        pairs = torch.unique(torch.stack([key, row]), dim=1)
        keys, inputs = torch.unique_consecutive(pairs[0], return_counts=True)
        common = inputs >= _INPUTS_PER_NGRAM
        keys, inputs = keys[common], inputs[common]
        most = torch.argsort(inputs, descending=True, stable=True)[:_MOST_NGRAMS].sort().values
        self.keys = keys[most]
        self.idf = ((1 + len(torch.unique(row))) / (1 + inputs[most])).log() + 1

    def _vectors(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row, n-gram and value of every entry, and the unseen share of every row."""
        row, key = _ngrams(ids)
        column = torch.searchsorted(self.keys, key).clamp_max(len(self.keys) - 1)
        known = self.keys[column] == key
        every = torch.bincount(row, minlength=len(ids))
        unseen = 1 - torch.bincount(row[known], minlength=len(ids)) / every.clamp_min(1)
        size = len(self.keys)
        entries, counts = torch.unique(row[known] * size + column[known], return_counts=True)
        row, column = entries // size, entries % size
        value = (1 + counts.log()) * self.idf[column]
        length = torch.zeros(len(ids), device=ids.device).index_add_(0, row, value.square()).sqrt()
        return row, column, value / length[row], unseen

    def _sparse(self, ids: Tensor) -> "csr_matrix":
        from scipy.sparse import csr_matrix

        row, column, value, _ = self._vectors(ids)
        return csr_matrix((value.numpy(), (row.numpy(), column.numpy())), shape=(len(ids), len(self.keys)))


class Tokens(Scorer):
    """Scores by n-grams; strange is an input whose n-grams the head never saw."""

    def __init__(self, ngrams: NgramHead) -> None:
        """Take a head."""
        super().__init__()
        self.ngrams = ngrams

    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits, and the share of each input's n-grams that are unknown."""
        found: tuple[Tensor, Tensor] = self.ngrams(batch.ids)
        return found

    def fit(self, training: Examples, held_out: Examples, settings: RouterSettings) -> None:
        """Fit the head."""
        self.ngrams.fit(training, held_out)

    def refit(self, everything: Examples) -> None:
        """Fit the head once more."""
        self.ngrams.refit(everything)


def _ngrams(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Row and key of every token and of every two neighbouring tokens of (batch, seq) ids."""
    real = ids != PADDING
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    pair = real[:, :-1] & real[:, 1:]
    pairs = (ids[:, :-1] + 1) * _SHIFT + ids[:, 1:]
    return torch.cat([rows[real], rows[:, :-1][pair]]), torch.cat([ids[real], pairs[pair]])
