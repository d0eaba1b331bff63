"""A few epochs of training that give a compressed model back what compression took, its policy unchanged."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tightrope.compressors.calibrate import batch_of, first_tensor
from tightrope.compressors.capture import arguments
from tightrope.spaces.errors import CompressError, DataError

log = logging.getLogger(__name__)
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Tuning:
    """How fine-tuning runs. `distil` is the weight of the dense model's word against the labels'; `temperature` softens it."""

    epochs: int = 3
    lr: float = 3e-4
    weight_decay: float = 1e-4
    distil: float = 0.7
    temperature: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.lr <= 0 or not 0 <= self.distil <= 1 or self.temperature <= 0:
            raise CompressError(f"epochs must be at least 0, lr and temperature above 0 and distil within [0, 1], got {self}")


def finetune(
    small: fx.GraphModule,
    dense: nn.Module,
    train: Iterable[Any],
    tuning: Tuning | None = None,
    *,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    on_step: Progress | None = None,
) -> fx.GraphModule:
    """Train `small` in place, distilling from `dense` (Hinton et al. 2015), rounding in the loop; returns it.

    Weights are rounded in every forward pass and their gradients go straight through; steps and ranges stay as they are, so
    the policy, the bytes and the device's cost do not change.

    Args:
        train: batches `(inputs, target)`, or inputs alone, which then learn from the dense model only.
        augment: applied to the inputs (a tensor) of each batch before both models see it.
        on_step: called with `(step, steps, loss)`.

    Raises:
        DataError: there is no batch, or the loss is not finite.
    """
    tuning = tuning or Tuning()
    batches = list(train)
    if not batches:
        raise DataError("the train split is empty; fine-tuning needs at least one batch")
    generator = torch.Generator().manual_seed(tuning.seed)
    parameters = [p for p in small.parameters() if p.requires_grad]
    steps = tuning.epochs * len(batches)
    optimiser = torch.optim.AdamW(parameters, lr=tuning.lr, weight_decay=tuning.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / max(1, steps))))
    dense.eval()
    answers = None if augment is not None else _answers(dense, batches)
    for step, (inputs, target, known) in enumerate(_stream(batches, answers, tuning.epochs, generator), 1):
        if augment is not None and isinstance(inputs, Tensor):
            inputs = augment(inputs, generator)
        args, kwargs = arguments(inputs)
        teacher = _answer(dense, inputs) if known is None else known
        loss = _loss(first_tensor(small(*args, **kwargs)), teacher, target, tuning)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DataError(f"the loss of fine-tuning is {value} in step {step}; lower its learning rate ({tuning.lr})")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimiser.step()
        schedule.step()
        if on_step is not None:
            on_step(step, steps, value)
    return small


def _answer(dense: nn.Module, inputs: Any) -> Tensor:
    args, kwargs = arguments(inputs)
    with torch.no_grad():
        return first_tensor(dense(*args, **kwargs))


def _answers(dense: nn.Module, batches: Sequence[Any]) -> list[Tensor] | None:
    """What the dense model says to each batch, asked once, where a row answers each example."""
    found = [_answer(dense, batch_of(item)[0]) for item in batches]
    fits = all(isinstance(x, Tensor) and len(x) == len(y) for (x, _), y in zip(map(batch_of, batches), found, strict=True))
    return found if fits else None


def _stream(
    batches: Sequence[Any], answers: list[Tensor] | None, epochs: int, generator: torch.Generator
) -> Iterator[tuple[Any, Any, Tensor | None]]:
    """Inputs, targets and answers in a new order each epoch; examples are dealt anew where both are tensors."""
    pairs = [batch_of(item) for item in batches]
    whole = all(isinstance(x, Tensor) and isinstance(y, Tensor) for x, y in pairs)
    if whole:
        inputs, targets = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
        known = None if answers is None else torch.cat(answers)
    for _ in range(epochs):
        if whole:
            for chosen in torch.split(torch.randperm(len(inputs), generator=generator), -(-len(inputs) // len(pairs))):
                yield inputs[chosen], targets[chosen], None if known is None else known[chosen]
        else:
            for index in torch.randperm(len(pairs), generator=generator).tolist():
                yield *pairs[index], None if answers is None else answers[index]


def _loss(out: Tensor, teacher: Tensor, target: Any, tuning: Tuning) -> Tensor:
    flat, soft = out.reshape(-1, out.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    t = tuning.temperature
    distilled = F.kl_div(F.log_softmax(flat / t, 1), F.log_softmax(soft / t, 1), reduction="batchmean", log_target=True) * t * t
    labelled = isinstance(target, Tensor) and not target.is_floating_point() and target.numel() == len(flat)
    if not labelled or tuning.distil == 1:
        return distilled
    return tuning.distil * distilled + (1 - tuning.distil) * F.cross_entropy(flat, target.reshape(-1))
