"""Low-rank factors of a layer's weights."""

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

Tensor = NDArray[np.float64]


def svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation `second @ first` of an `out x in` matrix at this rank (Eckart-Young), split evenly.

    Returns:
        `rank x in` and `out x rank`.
    """
    wide = weight.shape[0] < weight.shape[1]
    tall = weight.T if wide else weight
    basis, energy = leading(tall.T @ tall, rank)
    root = np.sqrt(np.sqrt(np.maximum(energy, 0))) + 1e-30  # of the singular values
    other = tall @ basis / root
    return (other.T, basis * root) if wide else ((basis * root).T, other)


def leading(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` leading eigenvectors, as columns, and eigenvalues of a symmetric matrix."""
    values, vectors = eigh(gram, subset_by_index=[len(gram) - rank, len(gram) - 1], check_finite=False)
    return vectors[:, ::-1], values[::-1]


def spatial(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A k x 1 then a 1 x k convolution (Jaderberg et al. 2014, Speeding up Convolutional Neural Networks, scheme 2).

    The SVD of the weights with (in, height) against (out, width) is the best pair at this rank.

    Args:
        weight: `out x in x kh x kw`.
    Returns:
        `rank x in x kh x 1` and `out x rank x 1 x kw`.
    """
    outputs, inputs, height, width = weight.shape
    first, second = svd(weight.transpose(0, 3, 1, 2).reshape(outputs * width, inputs * height), rank)
    return first.reshape(rank, inputs, height, 1), second.reshape(outputs, width, rank).transpose(0, 2, 1)[:, :, None, :]


def tucker(weight: Tensor, inner: int, outer: int) -> tuple[Tensor, Tensor, Tensor]:
    """1x1, k x k and 1x1 convolutions (Kim et al. 2016, Compression of Deep CNNs for Fast and Low Power Mobile Applications).

    Truncated higher-order SVD along both channel axes.

    Args:
        weight: `out x in x kh x kw`; `inner` channels are left of the inputs, `outer` of the outputs.
    Returns:
        `inner x in x 1 x 1`, `outer x inner x kh x kw` and `out x outer x 1 x 1`.
    """
    along_in, along_out = weight.transpose(1, 0, 2, 3).reshape(weight.shape[1], -1), weight.reshape(weight.shape[0], -1)
    u_in, u_out = leading(along_in @ along_in.T, inner)[0], leading(along_out @ along_out.T, outer)[0]
    core = np.einsum("oikl,ir,os->srkl", weight, u_in, u_out, optimize=True)
    return u_in.T[:, :, None, None], core, u_out[:, :, None, None]


def factors(weight: Tensor, form: str, rank: int) -> tuple[Tensor, ...]:
    """The weights of the units that a layer becomes, in their order (`spaces/unit.py`)."""
    if form == "svd":
        matrix = weight.reshape(weight.shape[:2])
        return tuple(f.reshape(f.shape + (1,) * (weight.ndim - 2)) for f in svd(matrix, rank))
    if form == "spatial":
        return spatial(weight, rank)
    return tucker(weight, min(rank, weight.shape[1]), min(rank, weight.shape[0]))


def product(parts: tuple[Tensor, ...], form: str) -> Tensor:
    """The weights that factors amount to."""
    if form == "svd":
        first, second = (f.reshape(f.shape[:2]) for f in parts)
        whole: Tensor = (second @ first).reshape(len(second), -1, *parts[0].shape[2:])
        return whole
    if form == "spatial":
        joined: Tensor = np.einsum("rih,orw->oihw", parts[0][..., 0], parts[1][:, :, 0], optimize=True)
        return joined
    made: Tensor = np.einsum("ri,srkl,os->oikl", parts[0][:, :, 0, 0], parts[1], parts[2][:, :, 0, 0], optimize=True)
    return made
