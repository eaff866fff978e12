"""Grouped matmuls through PyTorch, in the same process: cuBLAS as PyTorch calls it, and its grouped_mm."""

import importlib
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.matmuls import Candidate, Operation, Problem, draw_sample


def load_torch(platform: str) -> types.ModuleType:
    """Imports torch, if it computes on the same kind of device as JAX.

    Args:
        platform: JAX's: "gpu" or "cpu".

    Raises:
        ImportError: There is no torch, or it computes elsewhere.
        RuntimeError: It cannot compute.
    """
    torch = importlib.import_module("torch")
    device = "gpu" if torch.cuda.is_available() else "cpu"
    if device != platform:
        raise ImportError(f"torch {torch.__version__} computes on a {device} and JAX on a {platform}")
    ones = torch.ones((16, 16), dtype=torch.bfloat16, device="cuda" if device == "gpu" else device)
    (ones @ ones).sum().item()  # raises if torch finds its libraries to be of another version
    return torch


class TorchMatmuls:
    """The operands of a problem on torch's first device, and the candidates that multiply them.

    Args:
        torch: The module, as `load_torch` gives it.
        problem: The shapes.
        seed: Of the operands and the group sizes.
    """

    def __init__(self, torch: types.ModuleType, problem: Problem, seed: int):
        self._torch, self._problem, self._seed = torch, problem, seed
        self._sizes = problem.random_group_sizes(seed)
        self._on_gpu = torch.cuda.is_available()
        device = "cuda" if self._on_gpu else "cpu"
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Any:
            return torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)

        M, K, N, G = problem.M, problem.K, problem.N, problem.G
        self._lhs, self._rhs, self._out_grad = normal(M, K), normal(G, K, N), normal(M, N)
        self._ends = torch.tensor(np.cumsum(self._sizes), dtype=torch.int32, device=device)

    def candidates(self) -> list[Candidate]:
        """Dense and batched products, and grouped_mm."""
        torch, G, ends = self._torch, self._problem.G, self._ends
        lhs, rhs, out_grad = self._lhs, self._rhs, self._out_grad
        batched_lhs, batched_out_grad = lhs.view(G, -1, lhs.shape[1]), out_grad.view(G, -1, out_grad.shape[1])

        def grouped_mm(left: Any, right: Any) -> Any:
            public = getattr(torch.nn.functional, "grouped_mm", None)
            return (public or torch._grouped_mm)(left, right, offs=ends)

        return [
            *self._of(
                "torch_dense",
                forward=lambda: lhs @ rhs[0],
                transposed=lambda: out_grad @ rhs[0].T,
                weight_gradient=lambda: (lhs.T @ out_grad)[None],
                groups=self._problem.equal_group_sizes(1),
            ),
            *self._of(
                "torch_batched",
                forward=lambda: torch.bmm(batched_lhs, rhs).flatten(0, 1),
                transposed=lambda: torch.bmm(batched_out_grad, rhs.transpose(1, 2)).flatten(0, 1),
                weight_gradient=lambda: torch.bmm(batched_lhs.transpose(1, 2), batched_out_grad),
                groups=self._problem.equal_group_sizes(G),
            ),
            *self._of(
                "torch_grouped_mm",
                forward=lambda: grouped_mm(lhs, rhs),
                transposed=lambda: grouped_mm(out_grad, rhs.transpose(1, 2)),
                weight_gradient=lambda: grouped_mm(lhs.T, out_grad),
                groups=self._sizes,
            ),
        ]

    def free(self) -> None:
        """Gives the memory of operands and results back to the device, for JAX to use."""
        del self._lhs, self._rhs, self._out_grad, self._ends
        if self._on_gpu:
            self._torch.cuda.empty_cache()

    def _of(
        self,
        implementation: str,
        *,
        forward: Callable[[], Any],
        transposed: Callable[[], Any],
        weight_gradient: Callable[[], Any],
        groups: np.ndarray,
    ) -> list[Candidate]:
        functions: dict[Operation, Callable[[], Any]] = {
            "forward": forward,
            "transposed": transposed,
            "weight_gradient": weight_gradient,
        }
        return [
            Candidate(
                operation,
                implementation,
                prepare=lambda run=run: (run, {}),
                relative_error=lambda out, operation=operation: self._relative_error(operation, out, groups),
                wait=lambda _: self._torch.cuda.synchronize() if self._on_gpu else None,
            )
            for operation, run in functions.items()
        ]

    def _relative_error(self, operation: Operation, out: Any, groups: np.ndarray) -> float:
        sample = draw_sample(self._problem, groups, self._seed)
        if operation == "weight_gradient":
            columns = sample.columns.tolist()
            bounds = list(zip(sample.groups.tolist(), sample.start.tolist(), sample.end.tolist(), strict=True))
            actual = [out[group][columns] for group, _, _ in bounds]
            expected = [
                self._lhs[start:end, columns].float().T @ self._out_grad[start:end].float() for _, start, end in bounds
            ]
        else:
            left, rhs = (self._lhs, self._rhs) if operation == "forward" else (self._out_grad, self._rhs.mT)
            pairs = list(zip(sample.rows.tolist(), sample.row_group.tolist(), strict=True))
            actual = [out[row] for row, _ in pairs]
            expected = [left[row].float() @ rhs[group].float() for row, group in pairs]
        actual, expected = self._torch.stack(actual).float(), self._torch.stack(expected)
        return float((actual - expected).norm() / expected.norm())
