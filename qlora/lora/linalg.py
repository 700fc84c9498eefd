"""Truncated SVD of a large matrix, and SVD of a product B A that is never formed."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-5  # residual of a singular triplet, relative to its singular value
SMALL = 512  # a matrix with both sides up to this is decomposed whole


@torch.no_grad()
def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triplets, to fp32's accuracy, by block Krylov iteration (arXiv 1504.05477).

    The space of G, M G, M^2 G, ... with M = W^T W and a few random columns G contains them after some products;
    `torch.svd_lowrank` keeps only the last power and needs many times more if singular values are close.

    Args:
        matrix: W (out, in) fp32.
    Returns:
        U (out, rank), S (rank,) descending, V^T (rank, in). The sign of each triplet is arbitrary; U S V^T is not.
    """
    width = rank + 8
    if max(matrix.shape) <= SMALL or 4 * width > min(matrix.shape):
        return _whole_svd(matrix, rank)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis = torch.linalg.qr(start)[0]  # (in, k) orthonormal
    product = matrix @ basis  # (out, k)
    while basis.shape[1] + width <= min(matrix.shape) // 2:
        for _ in range(4):
            block = matrix.T @ product[:, -width:]
            for _ in range(2):  # twice is enough for orthogonality to rounding
                block -= basis @ (basis.T @ block)
            block = torch.linalg.qr(block)[0]
            basis, product = torch.cat([basis, block], 1), torch.cat([product, matrix @ block], 1)
        values, vectors = torch.linalg.eigh((product.T @ product).double())
        S, chosen = values.flip(0)[:rank].clamp(min=0).sqrt().float(), vectors.flip(1)[:, :rank].float()
        U, V = product @ chosen / S, basis @ chosen
        if bool(((matrix.T @ U - V * S).norm(dim=0) <= TOLERANCE * S).all()):
            return U, S, V.T
    return _whole_svd(matrix, rank)


def _whole_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank]


def split_svd(matrix: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """(A (rank, in), B (out, rank)) with scaling B A = svd_rank(matrix), the singular values split evenly."""
    U, S, Vh = truncated_svd(matrix, rank)
    root = (S / scaling).sqrt()
    return (root[:, None] * Vh).contiguous(), (U * root).contiguous()


def low_rank_svd(A: Tensor, B: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triplets of an update B A, in fp64, without forming it.

    With B = Q_B R_B and A^T = Q_A R_A (QR) it is Q_B (R_B R_A^T) Q_A^T, and the core in the middle is only (R, R).

    Args:
        A, B: (R, in), (out, R).
        rank: number of triplets; by default all, min(R, in, out).
    Returns:
        U (out, rank), S (rank,) falling, V^T (rank, in).
    """
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ U[:, :rank], S[:rank], Vh[:rank] @ Q_A.T
