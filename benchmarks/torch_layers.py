"""MoE layers on PyTorch: one way to check and time them all, and the one on grouped_mm."""

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.layers import RESULTS, Configuration, sample_tokens
from benchmarks.record import Record
from benchmarks.timing import Variant

_MIB = 2**20


def _as_they_are(w_up: Any, w_down: Any) -> tuple[Any, Any]:
    return w_up, w_down


@dataclasses.dataclass(frozen=True)
class TorchFunction:
    """How an implementation computes a layer; derivatives are autograd's.

    Attributes:
        layer: Computes y[T, D] from x[T, D], both weights as it wants them arranged, and logits[T, E].
        arrange: Makes these weights of w_up[E, D, H] and w_down[E, F, D].
        restore: The inverse of `arrange`, for weights and for their gradients.
    """

    layer: Callable[[Any, Any, Any, Any], Any]
    arrange: Callable[[Any, Any], tuple[Any, Any]] = _as_they_are
    restore: Callable[[Any, Any], tuple[Any, Any]] = _as_they_are


class TorchLayer:
    """A layer with operands on torch's first device.

    Args:
        torch: The module, as `benchmarks.torch_matmuls.load_torch` gives it.
        configuration: The shapes.
        function: What computes the layer.
        seed: Of the operands.
    """

    def __init__(self, torch: types.ModuleType, configuration: Configuration, function: TorchFunction, seed: int):
        self._torch, self._configuration, self._function = torch, configuration, function
        self._on_gpu = torch.cuda.is_available()
        self._device = "cuda" if self._on_gpu else "cpu"
        self._memory: Record = {}
        generator = torch.Generator(self._device).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Any:
            values = torch.randn(shape, dtype=torch.bfloat16, device=self._device, generator=generator)
            return values.mul_(scale)

        c = configuration
        self._x, self._dy = normal(c.T, c.D), normal(c.T, c.D)
        weights = function.arrange(
            normal(c.E, c.D, c.up_columns, scale=c.D**-0.5),
            normal(c.E, c.F, c.D, scale=c.F**-0.5),
        )
        self._weights = tuple(weight.contiguous() for weight in weights)
        self._dense = normal(c.num_rows, c.D), normal(c.D, c.up_columns)
        self._logits: Any = None
        for parameter in (self._x, *self._weights):
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
        y = self._forward()[tokens]
        self._both(dy)  # what is tuned or set up the first time is not to be counted as this layer's memory

        before = self._allocated()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        y_with_backward = self._layer()
        kept = self._allocated() - before - y_with_backward.nbytes
        gradients = torch.autograd.grad(y_with_backward, self._inputs, dy)
        if self._on_gpu:
            # Results are counted by the peak here, as nothing tells them from the rest.
            peak = torch.cuda.max_memory_allocated() - before
            self._memory = {"kept_mib": kept / _MIB, "peak_with_outputs_mib": peak / _MIB}
        of_x, of_up, of_down, of_logits = gradients
        actual = (y, y_with_backward[tokens], of_x, *self._function.restore(of_up, of_down), of_logits)
        errors = {}
        for name, result, reference in zip(RESULTS, actual, expected, strict=True):
            difference = (result.detach().float() - reference).norm()
            errors[name] = float(difference) / (float(reference.norm()) or 1)
        return errors, None

    def facts(self) -> Record:
        """Memory, and the version of CUDA."""
        return {"torch_cuda": self._torch.version.cuda, **self._memory}

    def variants(self) -> dict[str, Variant]:
        """What to time."""
        lhs, rhs = self._dense
        calls = {"forward": self._forward, "both": lambda: self._both(self._dy), "dense": lambda: lhs @ rhs}
        for call in calls.values():
            call()  # nothing is slow for being the first time
        return {name: Variant(call, self._wait) for name, call in calls.items()}

    @property
    def _inputs(self) -> tuple[Any, ...]:
        return self._x, *self._weights, self._logits

    def _layer(self) -> Any:
        return self._function.layer(*self._inputs)

    def _forward(self) -> Any:
        with self._torch.no_grad():
            return self._layer()

    def _both(self, dy: Any) -> Any:
        y = self._layer()
        return y, self._torch.autograd.grad(y, self._inputs, dy)

    def _exact(self, tokens: Any) -> tuple[Any, ...]:
        """What `RESULTS` names, in float32."""
        torch, c = self._torch, self._configuration
        operands = self._x[tokens], *self._function.restore(*self._weights), self._logits[tokens]
        inputs = x, w_up, w_down, logits = [operand.detach().float().requires_grad_() for operand in operands]
        chosen, expert = logits.topk(c.K, dim=1)
        of_expert = torch.zeros_like(logits).scatter(1, expert, chosen.softmax(dim=1))
        y = torch.zeros_like(x)
        # Unbound, for each w_up[e] would have a gradient as large as that of all experts.
        for up, down, weight in zip(w_up.unbind(), w_down.unbind(), of_expert.unbind(1), strict=True):
            y = y + weight[:, None] * (activate(torch, c, x @ up) @ down)
        of_x, of_up, of_down, of_logits = torch.autograd.grad(y, inputs, self._dy[tokens].float())

        def elsewhere_zero(of_sample: Any) -> Any:
            zero = torch.zeros((c.T, of_sample.shape[1]), device=self._device)
            return zero.index_copy_(0, tokens, of_sample)

        y = y.detach()
        return y, y, elsewhere_zero(of_x), of_up, of_down, elsewhere_zero(of_logits)

    def _allocated(self) -> int:
        return self._torch.cuda.memory_allocated() if self._on_gpu else 0

    def _wait(self, _: Any) -> None:
        if self._on_gpu:
            self._torch.cuda.synchronize()


def grouped_mm_layer(torch: types.ModuleType, configuration: Configuration) -> TorchFunction:
    """Rows sorted by expert and copied, grouped_mm, activation, grouped_mm, weighted sum.

    So the grouped mode of MegaBlocks computes it (arXiv 2211.15841).
    """
    c = configuration
    gather = _gather_function(torch)
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm

    def layer(x: Any, w_up: Any, w_down: Any, logits: Any) -> Any:
        weight, sorted_expert, order = route(configuration, logits)
        position = torch.empty_like(order)
        position[order] = torch.arange(c.num_rows, device=x.device)
        experts = torch.arange(c.E, device=x.device)
        ends = torch.searchsorted(sorted_expert, experts, right=True, out_int32=True)

        rows = gather(x, order // c.K, position)  # [R, D]
        a = activate(torch, c, grouped_mm(rows, w_up, offs=ends))  # [R, F]
        v = grouped_mm(a, w_down, offs=ends)  # [R, D]
        v_of_token = gather(v, position, order).view(c.T, c.K, c.D)
        return torch.bmm(weight[:, None], v_of_token)[:, 0]

    return TorchFunction(layer)


def route(configuration: Configuration, logits: Any) -> tuple[Any, Any, Any]:
    """Routes tokens: bfloat16 weights[T, K], the expert of each of R assignments in sorted order, and that order."""
    chosen, expert = logits.topk(configuration.K, dim=1)
    return chosen.softmax(dim=1).bfloat16(), *expert.flatten().sort(stable=True)


def activate(torch: types.ModuleType, configuration: Configuration, h: Any) -> Any:
    """Makes the hidden [rows, F] of the pre-activations [rows, H], of which a gated MLP has the gates first."""
    functional = torch.nn.functional
    if configuration.activation == "gelu":
        return functional.gelu(h, approximate="tanh")
    gate, up = h.chunk(2, dim=1)
    return functional.silu(gate) * up


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
