"""Keeps matrices as low-rank pairs: truncated SVD of differences and of sums of LoRA products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from twinmerge.errors import RankError

_CHUNK = 4096  # rows upcast to float64 at a time
_OVERSAMPLING = 8  # directions a block has more than are kept
_GAIN = 5e-3  # of the energy left: a block that adds less is the last
_NOISE = 1e-6  # of the whole energy: what float32 does not resolve


@dataclass(frozen=True)
class LowRank:
    """A matrix as two factors, `up @ down`: a LoRA pair with scale 1 (METHOD §3).

    `up` is U diag(s) and `down` is V^T, directions sorted by falling singular value. Rank 0 is the
    zero matrix.

    Example:
        >>> LowRank(torch.ones(4, 1), torch.ones(1, 3)).dense().shape
        torch.Size([4, 3])
    """

    up: Tensor  # (out, rank)
    down: Tensor  # (rank, in)

    def __post_init__(self) -> None:
        """Refuse factors that do not fit each other.

        Raises:
            RankError: if they are no matrices of one dtype with an inner axis in common.
        """
        up, down = self.up, self.down
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0] or up.dtype != down.dtype:
            raise RankError(
                f"factors must be (out, rank) and (rank, in) of one dtype, found "
                f"{tuple(up.shape)} {up.dtype} and {tuple(down.shape)} {down.dtype}"
            )

    @property
    def rank(self) -> int:
        """Directions kept."""
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix, `(out, in)`."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors."""
        return self.up.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.up.nbytes + self.down.nbytes

    def energy(self) -> float:
        """Squared Frobenius norm of the matrix, from the factors alone."""
        up, down = self.up.double(), self.down.double()
        return float(((up.T @ up) * (down @ down.T)).sum())

    def dense(self) -> Float[Tensor, "out in"]:
        """The matrix itself, in the dtype of the factors."""
        return self.up @ self.down

    def truncate(self, rank: int) -> LowRank:
        """Keep the first `rank` directions.

        Raises:
            RankError: if `rank` is outside `[0, self.rank]`.
        """
        _require_rank(rank, self.rank)
        return type(self)(self.up[:, :rank].contiguous(), self.down[:rank].contiguous())

    def to(self, dtype: torch.dtype) -> LowRank:
        """The same pair in another float dtype."""
        return LowRank(self.up.to(dtype), self.down.to(dtype))

    def pack(self) -> dict[str, Tensor]:
        """`up` and `down`."""
        return {"up": self.up.contiguous(), "down": self.down.contiguous()}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> LowRank:
        """What `pack` gave."""
        return cls(tensors["up"], tensors["down"])


def decompose(
    difference: Float[Tensor, "out in"], rank: int | None = None
) -> tuple[LowRank, Float[Tensor, " directions"]]:
    """Truncated SVD together with the whole spectrum.

    The singular vectors of the shorter side are the eigenvectors of the smaller Gram matrix, summed
    in float64; the other factor is the projection of the difference on them. So the factors at full
    rank multiply back to the difference to rounding, whatever its conditioning. Singular values
    below about 1e-8 of the largest are noise.

    Args:
        difference: expert minus shared expert, `(out, in)`, any float dtype, finite.
        rank: directions kept, `0 <= rank <= min(out, in)`; None keeps all.

    Returns:
        The factors, and all `min(out, in)` singular values in falling order; float64 if the
        difference is float64, else float32. Of each row of `down` the largest entry is positive.

    Raises:
        RankError: if `rank` is no integer in `[0, min(out, in)]`.

    Source: METHOD §3, arXiv:2406.15479; the best approximation of its rank (Eckart-Young).
    """
    kept = _require_rank(rank, min(difference.shape))
    tall = _tall(difference)
    eigenvalues, eigenvectors = torch.linalg.eigh(_gram(tall))
    factors = _project(difference, eigenvectors.flip(1)[:, :kept])
    return factors, _spectrum(eigenvalues, difference.dtype)


def truncate(difference: Float[Tensor, "out in"], rank: int, seed: int = 0) -> LowRank:
    """Keep the `rank` largest singular directions of a weight difference, without finding the others.

    A random block of directions is multiplied with the difference and back, block after block (block Krylov,
    arXiv:1504.05477), and the best `rank` directions of their span are kept. How much energy they capture is known
    exactly after every block; it ends with the block that adds less than 0.5 % of the energy that is still left. Where
    the spectrum is so flat that this takes too many blocks, and for ranks that are no small part of the matrix, the
    exact decomposition answers.

    Args:
        difference: expert minus shared expert, `(out, in)`, any float dtype, finite; float64 is computed in float64,
            everything else in float32.
        rank: directions kept, `0 <= rank <= min(out, in)`.
        seed: of the first block; same matrix and seed, same bits.

    Returns:
        Factors on the device of `difference`, `up @ down ≈ difference`. What they leave is at most a percent more than
        the best factors of this rank leave: measured, see docs/merging.md, as only what is left is known for certain.

    Raises:
        RankError: if `rank` is no integer in `[0, min(out, in)]`.

    Example:
        >>> truncate(torch.eye(4), rank=2).up.shape
        torch.Size([4, 2])
    """
    _require_rank(rank, min(difference.shape))
    basis = _leading_basis(_tall(difference).to(_factor_dtype(difference.dtype)), rank, seed) if rank else None
    return decompose(difference, rank)[0] if basis is None else _project(difference, basis)


def _leading_basis(tall: Float[Tensor, "long short"], rank: int, seed: int) -> Float[Tensor, "short rank"] | None:
    """Orthonormal, near the leading right singular vectors; None if half of the matrix does not suffice for them."""
    short, width = tall.shape[1], rank + _OVERSAMPLING
    total = float(torch.linalg.vector_norm(tall, dtype=torch.float64)) ** 2
    block = torch.randn(short, width, generator=torch.Generator().manual_seed(seed), dtype=tall.dtype).to(tall.device)
    basis, images = tall.new_empty(short, 0), tall.new_empty(len(tall), 0)
    captured = 0.0
    while basis.shape[1] + width <= short // 2:
        basis = torch.cat([basis, _orthonormal(block, basis)], dim=1)
        images = torch.cat([images, tall @ basis[:, -width:]], dim=1)
        values, vectors = torch.linalg.eigh((images.T @ images).double())
        before, captured = captured, float(values[-rank:].sum())
        if captured - before <= _GAIN * max(total - captured, _NOISE * total):
            leading = basis @ vectors[:, -rank:].flip(1).to(tall.dtype)
            error = leading.T @ leading - torch.eye(rank, dtype=tall.dtype, device=tall.device)
            return leading if float(error.abs().max()) < 1e-4 else None
        block = tall.T @ images[:, -width:]
    return None


def _orthonormal(block: Float[Tensor, "short width"], basis: Float[Tensor, "short k"]) -> Float[Tensor, "short width"]:
    """An orthonormal basis of what a block adds to another; twice, as what is left may be small and mostly rounding."""
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    return block


def compress_product(
    ups: Sequence[Float[Tensor, "out _"]], downs: Sequence[Float[Tensor, "_ in"]], rank: int | None = None
) -> tuple[LowRank, Float[Tensor, " directions"]]:
    """Truncated SVD of `sum_i ups[i] @ downs[i]` without forming the `(out, in)` matrix.

    The stacked factors are orthogonalised by QR and only the small core between them is decomposed
    (METHOD §3), so the cost is that of the factors.

    Args:
        ups: left factors `(out, k_i)`; the ranks may differ.
        downs: right factors `(k_i, in)`, scale already multiplied in.
        rank: directions kept, `0 <= rank <= min(out, in)`; None keeps all there are. With
            `k = sum k_i` there are `min(out, in, k)`, and a rank above that keeps them all.

    Returns:
        The factors, and all `min(out, in, k)` singular values in falling order; float64 if the
        first factor is float64, else float32.

    Raises:
        RankError: if the factors do not fit each other, or `rank` is no integer in `[0, min(out, in)]`.
    """
    shapes = {LowRank(up, down).shape for up, down in zip(ups, downs, strict=True)}
    if len(shapes) != 1:
        raise RankError(f"products to be added must have one shape (out, in), found {sorted(shapes) or 'none'}")
    kept = _require_rank(rank, min(shapes.pop()))
    left, left_core = torch.linalg.qr(torch.cat([up.double() for up in ups], dim=1))
    right, right_core = torch.linalg.qr(torch.cat([down.double() for down in downs]).T)
    core_left, values, core_right = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    up = left @ (core_left * values)[:, :kept]
    down = core_right[:kept] @ right.T
    return _pair(up, down, ups[0].dtype), values.to(_factor_dtype(ups[0].dtype))


def kept_energy(pair: LowRank, difference: Float[Tensor, "out in"] | LowRank) -> Float64[Tensor, " counts"]:
    """How much of a matrix's squared norm the first 0, 1, ... directions of a pair keep: ||D||^2 - ||D - P_r||^2.

    The directions need not be orthogonal, as those that were rounded or weighed are not; then more of them may keep
    less.

    Args:
        pair: rounded as it is stored.
        difference: the matrix, or an exact pair of it.

    Returns:
        (rank + 1,).
    """
    up, down = pair.up.double(), pair.down.double()
    if isinstance(difference, LowRank):
        inner = ((up.T @ difference.up.double()) * (down @ difference.down.double().T)).sum(dim=1)
    else:
        inner = ((difference @ pair.down.T.to(difference.dtype)).double() * up).sum(dim=0)
    among = ((up.T @ up) * (down @ down.T)).cumsum(0).cumsum(1).diagonal()
    return torch.cat([inner.new_zeros(1), 2 * inner.cumsum(0) - among])


def as_matrix(tensor: Shaped[Tensor, "out *rest"]) -> Shaped[Tensor, "out in"]:
    """View a parameter as `(out, in)`: a convolution becomes `(out, in * kh * kw)`.

    Raises:
        ValueError: if the tensor has fewer than two axes.
    """
    if tensor.ndim < 2:
        raise ValueError(f"a matrix needs two axes or more, found shape {tuple(tensor.shape)}")
    return tensor.flatten(1)


def _require_rank(rank: int | None, limit: int) -> int:
    if rank is None:
        return limit
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= limit:
        raise RankError(f"rank must be an integer from 0 to {limit}, the smaller side of the matrix, found {rank!r}")
    return rank


def _tall(matrix: Float[Tensor, "out in"]) -> Float[Tensor, "long short"]:
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def _project(difference: Float[Tensor, "out in"], basis: Float[Tensor, "short rank"]) -> LowRank:
    """The factors of a difference whose leading vectors of the shorter side are `basis`."""
    projected = torch.cat([rows.to(basis.dtype) @ basis for rows in torch.split(_tall(difference), _CHUNK)])
    if difference.shape[0] >= difference.shape[1]:
        return _pair(projected, basis.T, difference.dtype)
    norms = projected.norm(dim=0)
    return _pair(basis * norms, (projected / norms.where(norms > 0, 1.0)).T, difference.dtype)


def _gram(tall: Float[Tensor, "long short"]) -> Float64[Tensor, "short short"]:
    gram = tall.new_zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for rows in torch.split(tall, _CHUNK):
        wide = rows.double()
        gram.addmm_(wide.T, wide)
    return gram


def _spectrum(eigenvalues: Tensor, dtype: torch.dtype) -> Tensor:
    return eigenvalues.flip(0).clamp(min=0).sqrt().to(_factor_dtype(dtype))


def _pair(up: Tensor, down: Tensor, dtype: torch.dtype) -> LowRank:
    largest = down.gather(1, down.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(up.dtype)
    factor = _factor_dtype(dtype)
    return LowRank((up * signs.T).to(factor).contiguous(), (down * signs).to(factor).contiguous())


def _factor_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
