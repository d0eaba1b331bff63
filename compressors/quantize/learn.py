"""Steps of weights and ranges of activations that training moves with the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tightrope.compressors.quantize.fake import LEAST, Learning, Part, Quantizer


@contextmanager
def learned(small: nn.Module, weights: Learning, ranges: Learning) -> Iterator[None]:
    """Let the steps of all weights and the ranges of all points be learned inside, as factors of what they were.

    The factors are parameters of the modules, 1 at first: so a step moves in proportion to itself, however small it is. At the
    end they are multiplied in. Zero points stay, and with them which code stands for zero.
    """
    shared: dict[str, nn.Parameter] = {}
    for module in small.modules():
        if isinstance(module, Quantizer) and ranges != "fixed":
            own = nn.Parameter(torch.ones(()))
            module.stretch = shared.setdefault(module.source, own) if module.source else own
            module.clipped_only = ranges == "pact"
        elif isinstance(module, Part) and module.bits < 32 and weights != "fixed":
            module.stretch = nn.Parameter(torch.ones_like(module.scales))
    try:
        yield
    finally:
        for module in small.modules():
            if isinstance(module, Quantizer) and module.stretch is not None:
                factor = max(float(module.stretch.detach()), LEAST)
                module.set((module.low * float(module.scale) * factor, module.high * float(module.scale) * factor))
                module.stretch = None
            elif isinstance(module, Part) and module.stretch is not None:
                module.scales *= module.stretch.detach().clamp_min(LEAST)
                module.stretch = None
