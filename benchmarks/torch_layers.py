"""An MoE layer on PyTorch's grouped_mm, as the grouped mode of MegaBlocks computes it (arXiv 2211.15841)."""

import types
from typing import Any

import numpy as np

from benchmarks.layers import Configuration, sample_tokens
from benchmarks.record import Record
from benchmarks.timing import Variant

_MIB = 2**20


class TorchLayer:
    """Rows sorted by expert and copied, grouped_mm, activation, grouped_mm, weighted sum; derivatives by autograd.

    Args:
        torch: The module, as `benchmarks.torch_matmuls.load_torch` gives it.
        configuration: The shapes.
        seed: Of the operands.
    """

    def __init__(self, torch: types.ModuleType, configuration: Configuration, seed: int):
        self._torch, self._configuration = torch, configuration
        self._on_gpu = torch.cuda.is_available()
        self._device = "cuda" if self._on_gpu else "cpu"
        self._gather = _gather_function(torch)
        self._memory: Record = {}
        generator = torch.Generator(self._device).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Any:
            values = torch.randn(shape, dtype=torch.bfloat16, device=self._device, generator=generator)
            return values.mul_(scale)

        c = configuration
        self._x, self._dy = normal(c.T, c.D), normal(c.T, c.D)
        self._w_up, self._w_down = (
            normal(c.E, c.D, c.up_columns, scale=c.D**-0.5),
            normal(c.E, c.F, c.D, scale=c.F**-0.5),
        )
        self._dense = normal(c.num_rows, c.D), normal(c.D, c.up_columns)
        self._logits: Any = None
        for parameter in (self._x, self._w_up, self._w_down):
            parameter.requires_grad_()

    def route(self, logits: np.ndarray) -> None:
        """Takes the router's logits."""
        self._logits = self._torch.from_numpy(logits).to(self._device).requires_grad_()

    def check(self) -> tuple[dict[str, float], None]:
        """Compares with float32 on the sampled tokens; all others get a zero gradient of y. Measures memory too."""
        torch = self._torch
        tokens = torch.from_numpy(sample_tokens(self._configuration)).long().to(self._device)
        expected = self._exact(tokens)
        dy = torch.zeros_like(self._dy).index_copy_(0, tokens, self._dy[tokens])

        before = self._allocated()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        y = self._layer()
        kept = self._allocated() - before - y.nbytes
        gradients = torch.autograd.grad(y, self._inputs, dy)
        if self._on_gpu:
            # Results are counted by the peak here, as nothing tells them from the rest.
            peak = torch.cuda.max_memory_allocated() - before
            self._memory = {"kept_mib": kept / _MIB, "peak_with_outputs_mib": peak / _MIB}
        actual = {"y": y[tokens], "x": gradients[0], "w_up": gradients[1], "w_down": gradients[2]}
        actual["logits"] = gradients[3]
        for name in ("x", "logits"):
            elsewhere_zero = torch.zeros(actual[name].shape, device=self._device)
            expected[name] = elsewhere_zero.index_copy_(0, tokens, expected[name])
        errors = {}
        for name, reference in expected.items():
            difference = (actual[name].detach().float() - reference).norm()
            errors[name] = float(difference) / (float(reference.norm()) or 1)
        return errors, None

    def facts(self) -> Record:
        """Memory, and the version of CUDA."""
        return {"torch_cuda": self._torch.version.cuda, **self._memory}

    def variants(self) -> dict[str, Variant]:
        """What to time."""
        torch = self._torch
        lhs, rhs = self._dense

        def forward() -> Any:
            with torch.no_grad():
                return self._layer()

        def both() -> Any:
            y = self._layer()
            return y, torch.autograd.grad(y, self._inputs, self._dy)

        calls = {"forward": forward, "both": both, "dense": lambda: lhs @ rhs}
        for call in calls.values():
            call()  # nothing is slow for being the first time
        return {name: Variant(call, self._wait) for name, call in calls.items()}

    @property
    def _inputs(self) -> tuple[Any, ...]:
        return self._x, self._w_up, self._w_down, self._logits

    def _layer(self) -> Any:
        torch, c = self._torch, self._configuration
        chosen, expert = self._logits.topk(c.K, dim=1)
        weight = chosen.softmax(dim=1).to(torch.bfloat16)
        sorted_expert, order = expert.flatten().sort(stable=True)
        position = torch.empty_like(order)
        position[order] = torch.arange(c.num_rows, device=self._device)
        experts = torch.arange(c.E, device=self._device)
        ends = torch.searchsorted(sorted_expert, experts, right=True, out_int32=True)

        rows = self._gather(self._x, order // c.K, position)  # [R, D]
        a = self._activate(self._grouped_mm(rows, self._w_up, ends))  # [R, F]
        v = self._grouped_mm(a, self._w_down, ends)  # [R, D]
        of_token = self._gather(v, position, order).view(c.T, c.K, c.D)
        return torch.bmm(weight[:, None], of_token)[:, 0]

    def _exact(self, tokens: Any) -> dict[str, Any]:
        torch, c = self._torch, self._configuration
        inputs = [part.detach().float() for part in (self._x[tokens], self._w_up, self._w_down, self._logits[tokens])]
        x, w_up, w_down, logits = (part.requires_grad_() for part in inputs)
        chosen, expert = logits.topk(c.K, dim=1)
        of_expert = torch.zeros_like(logits).scatter(1, expert, chosen.softmax(dim=1))
        y = torch.zeros_like(x)
        for e in range(c.E):
            y = y + of_expert[:, e, None] * (self._activate(x @ w_up[e]) @ w_down[e])
        gradients = torch.autograd.grad(y, (x, w_up, w_down, logits), self._dy[tokens].float())
        return dict(zip(("y", "x", "w_up", "w_down", "logits"), (y.detach(), *gradients), strict=True))

    def _activate(self, h: Any) -> Any:
        functional = self._torch.nn.functional
        if self._configuration.activation == "gelu":
            return functional.gelu(h, approximate="tanh")
        gate, up = h.chunk(2, dim=1)
        return functional.silu(gate) * up

    def _grouped_mm(self, left: Any, right: Any, ends: Any) -> Any:
        public = getattr(self._torch.nn.functional, "grouped_mm", None)
        return (public or self._torch._grouped_mm)(left, right, offs=ends)

    def _allocated(self) -> int:
        return self._torch.cuda.memory_allocated() if self._on_gpu else 0

    def _wait(self, _: Any) -> None:
        if self._on_gpu:
            self._torch.cuda.synchronize()


def _gather_function(torch: types.ModuleType) -> Any:
    """Makes `gather(array, index, inverse)`, which reads rows, and whose derivative reads rows too.

    That of PyTorch's own indexing would add one row after the other, since it cannot know that `inverse` has all
    places of row i of the array in `index`, from `i * K` to `i * K + K - 1`.
    """

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, array: Any, index: Any, inverse: Any) -> Any:
            ctx.save_for_backward(inverse)
            ctx.num_rows = array.shape[0]
            return array[index]

        @staticmethod
        def backward(ctx: Any, grad: Any) -> tuple[Any, None, None]:
            (inverse,) = ctx.saved_tensors
            rows = grad[inverse]
            if rows.shape[0] != ctx.num_rows:
                rows = rows.view(ctx.num_rows, -1, rows.shape[1]).sum(dim=1)
            return rows, None, None

    return Gather.apply
