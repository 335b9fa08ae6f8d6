"""Muon: momentum whose singular values are all made one, so every direction of a layer learns at the same speed.

Source: Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with its quintic Newton-Schulz
coefficients; a convolution's kernel (out, in, rows, columns) is taken as the matrix (out, in * rows * columns).
"""

from __future__ import annotations

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Stochastic gradient descent with Nesterov momentum, orthogonalised. Parameters have two or more axes.

    The update of a matrix (m, n) is scaled by sqrt(max(1, m / n)), so one learning rate serves every shape.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("Muon takes no closure; compute the gradients first")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(state["momentum"], group["momentum"])
                matrix = direction.flatten(1)
                scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                parameter.add_(orthogonalise(matrix).view_as(parameter), alpha=-group["lr"] * scale)


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix (m, n), or each of several (k, m, n), with its singular values moved to about one (0.7 to 1.2). Zero stays zero.

    Every factor of the iteration is a polynomial of the small Gram matrix, and those commute: so it runs on (m, m) alone and touches the
    wide matrix twice, which for kernels nine times as wide as high is two thirds of the time.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    if x.dtype != torch.float32:  # the products of many factors below need more digits
        for _ in range(ITERATIONS):
            gram = x @ x.mT
            x = a * x + (b * gram + c * (gram @ gram)) @ x
        return x.mT if tall else x
    gram, product = x @ x.mT, torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    for _ in range(ITERATIONS):
        factor = b * gram + c * (gram @ gram)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor @ product
        gram = factor @ gram @ factor
    x = product @ x
    return x.mT if tall else x
