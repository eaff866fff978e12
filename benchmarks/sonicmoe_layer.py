"""The MoE layer of SonicMoE (arXiv 2512.14080), as the package sonic-moe computes it, given the router's logits."""

import functools
import importlib
import types
from typing import Any

from benchmarks.layers import Configuration
from benchmarks.torch_layers import TorchFunction

_MATMULS = {"forward": ("gemm", "gemm_gated"), "backward": ("gemm", "gemm_dgated")}


def load_sonicmoe() -> types.ModuleType:
    """Imports it, and has its matmuls take their default configuration: tuning each takes minutes.

    Raises:
        ImportError: There is no such package, or it lacks something.
    """
    functional = importlib.import_module("sonicmoe.functional")
    for part, names in _MATMULS.items():
        # The layer has no argument to hand on to them.
        module = importlib.import_module(f"sonicmoe.functional.{part}")
        for name in names:
            setattr(module, name, functools.partial(getattr(module, name), tuned=False))
    return functional


def sonicmoe_layer(torch: types.ModuleType, configuration: Configuration) -> TorchFunction:
    """Its whole layer, from the top-k among the logits to the weighted sum.

    Raises:
        NotImplementedError: The MLP is plain; SonicMoE has gated ones only.
    """
    if configuration.activation != "swiglu":
        raise NotImplementedError(f"not supported by SonicMoE, whose MLPs are gated: {configuration.activation}")
    sonicmoe = load_sonicmoe()

    def layer(x: Any, w_up: Any, w_down: Any, logits: Any) -> Any:
        y, _, _ = sonicmoe.moe_TC_softmax_topk_layer(
            x,
            _RouterThatGives(logits),
            w_up.permute(1, 2, 0),
            None,
            w_down.permute(1, 2, 0),
            None,
            configuration.K,
            torch.cuda.current_stream().cuda_stream,
            "swiglu",
            is_inference_mode_enabled=not torch.is_grad_enabled(),  # then it keeps no pre-activations
        )
        return y

    return TorchFunction(layer, arrange, restore)


def arrange(w_up: Any, w_down: Any) -> tuple[Any, Any]:
    """Makes [E, 2F, D], in which row 2i is gate i and row 2i + 1 is what it gates, and [E, D, F]."""
    E, D, H = w_up.shape
    return w_up.reshape(E, D, 2, H // 2).swapaxes(1, 3).reshape(E, H, D), w_down.swapaxes(1, 2)


def restore(w_up: Any, w_down: Any) -> tuple[Any, Any]:
    """The inverse of `arrange`."""
    E, H, D = w_up.shape
    return w_up.reshape(E, H // 2, 2, D).swapaxes(1, 3).reshape(E, D, H), w_down.swapaxes(1, 2)


class _RouterThatGives:
    """Stands for the weights [E, D] of a router, but what PyTorch's `linear` makes of them are these logits."""

    def __init__(self, logits: Any):
        self._logits = logits

    def size(self, axis: int) -> int:
        if axis != 0:
            raise NotImplementedError("a router of which only the number of experts is known")
        return self._logits.shape[1]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _, router = args
        return router._logits
