"""LARS optimiser, and warm-up + cosine learning rate. Copy this file into your project; it needs torch alone.

    optimizer = LARS(model.parameters(), lr=0.4)
    for step in range(total_steps):
        lr = warmup_cosine(step, total_steps, warmup_steps, peak_lr=0.4)
        for group in optimizer.param_groups:
            group["lr"] = lr
        ...; optimizer.step()
"""
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step in each layer is proportional to that layer's weights (You et al., 2017).

    For a parameter w of two or more dimensions with gradient g, and d = g + weight_decay * w:
        m <- momentum * m + trust_coefficient * |w| / |d| * d,    w <- w - lr * m
    (scale 1 where a norm is zero). Parameters of one dimension (biases, batch norm) get neither decay nor
    layer scaling. Momentum is applied after the layer scaling and does not contain the learning rate.

    params: parameters or parameter groups.  lr: a number, or a tensor of one on the parameters' device, which
    a CUDA graph reads anew at each replay.  Raises ValueError for a negative hyper-parameter.
    """

    def __init__(self, params: Iterable, lr: float | Tensor, momentum: float = 0.9,
                 weight_decay: float = 1e-6, trust_coefficient: float = 0.001):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay,
                        trust_coefficient=trust_coefficient)
        for name, value in defaults.items():
            if not isinstance(value, Tensor) and not value >= 0:  # to read a tensor is to wait for a GPU
                raise ValueError(f"LARS: {name} is {value}; give a number >= 0")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient. Never reads a value back from the device.

        The gradients serve as scratch space and hold something else afterwards: a copy costs as much as that.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            # One list of each kind: layers first, then vectors, so that a slice addresses the scaled ones.
            params.sort(key=lambda p: p.ndim <= 1)
            n = sum(p.ndim > 1 for p in params)
            layers, buffers = params[:n], [self.state[p]["momentum_buffer"] for p in params]
            updates = [p.grad for p in params]
            if layers:
                torch._foreach_add_(updates[:n], layers, alpha=group["weight_decay"])
                w_norm, d_norm = (torch.stack(torch._foreach_norm(x)) for x in (layers, updates[:n]))
                scale = group["trust_coefficient"] * w_norm / d_norm
                scale = torch.where((w_norm > 0) & (d_norm > 0), scale, 1.0)
                torch._foreach_mul_(updates[:n], list(scale.unbind()))
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            if isinstance(group["lr"], Tensor) and group["lr"].is_cuda:  # few kernels, for a copy
                torch._foreach_add_(params, torch._foreach_mul(buffers, -group["lr"]))
            elif isinstance(group["lr"], Tensor):
                torch._foreach_addcmul_(params, buffers, [-group["lr"]] * len(params))
            else:
                torch._foreach_add_(params, buffers, alpha=-group["lr"])
        return loss


def warmup_cosine(step: float, total_steps: float, warmup_steps: float, peak_lr: float) -> float:
    """Learning rate at `step`: linear from 0 to peak_lr at warmup_steps, half a cosine to 0 at the total."""
    if step < warmup_steps:
        return peak_lr * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak_lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
