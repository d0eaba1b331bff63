"""A few epochs of training that give a compressed model back what compression took, its policy unchanged."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
Augment = Callable[[Tensor, torch.Generator], Tensor]


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


class Finetuner:
    """Trains `small` in place, epoch by epoch, distilling from `dense` (Hinton et al. 2015), rounding in the loop.

    Weights are rounded in every forward pass and their gradients go straight through; steps and ranges stay as they are, so
    the policy, the bytes and the device's cost do not change. Between two epochs `state` is all that `load` needs to go on in
    another process as if it had never stopped.

    Args:
        train: batches `(inputs, target)`, or inputs alone, which then learn from the dense model only.
        augment: applied to the inputs (a tensor) of each batch before both models see it.

    Raises:
        DataError: there is no batch.
    """

    def __init__(
        self, small: fx.GraphModule, dense: nn.Module, train: Iterable[Any], tuning: Tuning, augment: Augment | None = None
    ) -> None:
        self.small, self.dense, self.tuning, self._augment = small, dense.eval(), tuning, augment
        self.done = 0  # epochs
        self._batches = list(train)
        if not self._batches:
            raise DataError("the train split is empty; fine-tuning needs at least one batch")
        self._generator = torch.Generator().manual_seed(tuning.seed)
        self._parameters = [p for p in small.parameters() if p.requires_grad]
        self._optimiser = torch.optim.AdamW(self._parameters, lr=tuning.lr, weight_decay=tuning.weight_decay)
        self._answers = None if augment is not None else _answers(dense, self._batches)

    def epoch(self, on_step: Progress | None = None) -> None:
        """Train one epoch; `on_step` is called with `(step, steps, loss)`.

        Raises:
            DataError: the loss is not finite.
        """
        tuning, steps = self.tuning, self.tuning.epochs * len(self._batches)
        dealt = _stream(self._batches, self._answers, 1, self._generator)
        for step, (given, target, known) in enumerate(dealt, self.done * len(self._batches)):
            inputs = self._augment(given, self._generator) if self._augment is not None and isinstance(given, Tensor) else given
            args, kwargs = arguments(inputs)
            teacher = _answer(self.dense, inputs) if known is None else known
            loss = _loss(first_tensor(self.small(*args, **kwargs)), teacher, target, tuning)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise DataError(f"the loss of fine-tuning is {value} in step {step + 1}; lower its learning rate ({tuning.lr})")
            for group in self._optimiser.param_groups:
                group["lr"] = tuning.lr * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
            self._optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self._parameters, 5.0)
            self._optimiser.step()
            if on_step is not None:
                on_step(step + 1, steps, value)
        self.done += 1

    def state(self) -> dict[str, Tensor]:
        """Weights, the optimiser's moments, the generator and the epochs done, as plain tensors."""
        found = {f"module.{name}": value for name, value in self.small.state_dict().items()}
        for i, moments in self._optimiser.state_dict()["state"].items():
            found |= {f"optimiser.{i}.{name}": value for name, value in moments.items()}
        found |= {"generator": self._generator.get_state(), "epochs": torch.tensor(self.done)}
        return {name: value.detach().clone().contiguous() for name, value in found.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken.

        Raises:
            CompressError: it is of another module.
        """
        moments: dict[int, dict[str, Tensor]] = {}
        weights = {}
        for name, value in state.items():
            kind, _, rest = name.partition(".")
            if kind == "module":
                weights[rest] = value
            elif kind == "optimiser":
                moments.setdefault(int(rest.partition(".")[0]), {})[rest.partition(".")[2]] = value
        try:
            self.small.load_state_dict(weights)
            groups = self._optimiser.state_dict()["param_groups"]
            self._optimiser.load_state_dict({"state": moments, "param_groups": groups})
            self._generator.set_state(state["generator"])
            self.done = int(state["epochs"])
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise CompressError(f"this state of fine-tuning is of another module: {str(error).splitlines()[0]}") from error


def finetune(
    small: fx.GraphModule,
    dense: nn.Module,
    train: Iterable[Any],
    tuning: Tuning | None = None,
    *,
    augment: Augment | None = None,
    on_step: Progress | None = None,
) -> fx.GraphModule:
    """Train `small` in place for all epochs (see `Finetuner`); returns it."""
    tuner = Finetuner(small, dense, train, tuning or Tuning(), augment)
    for _ in range(tuner.tuning.epochs):
        tuner.epoch(on_step)
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
