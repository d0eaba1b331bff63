"""A few epochs of training that give a compressed model back what compression took, its policy unchanged."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tightrope.compressors.calibrate import batch_of, first_tensor
from tightrope.compressors.capture import arguments
from tightrope.compressors.keeper import Keeper, Training
from tightrope.compressors.norms import normed
from tightrope.compressors.quantize.fake import LEARNING, Learning, Quantizer
from tightrope.compressors.quantize.learn import learned
from tightrope.spaces.errors import CompressError, DataError

log = logging.getLogger(__name__)
Progress = Callable[[int, int, float], None]
LEAST_BATCH = 16  # examples in each batch, for which batch norms are put back
SOME = 500  # examples from which batch norms take their first statistics


@dataclass(frozen=True)
class Tuning:
    """How fine-tuning runs.

    The rate `lr` is that of batches of `batch` examples, into which the examples are dealt anew where inputs and targets are
    tensors (None: the loader's own batches, in a new order each epoch). It rises for `warm` of the steps and falls along a
    cosine from there. `distil` is the weight of the dense model's word against the labels'; `temperature` softens it. `norms`
    puts the model's batch norms back for as long as it lasts. `weight_steps` and `ranges` say whether the steps of weights and
    the ranges of activations are learned too.
    """

    epochs: int = 3
    lr: float = 3e-3
    batch: int | None = 50
    weight_decay: float = 1e-4
    distil: float = 0.7
    temperature: float = 2.0
    warm: float = 0.1
    norms: bool = True
    weight_steps: Literal["fixed", "lsq"] = "fixed"
    ranges: Learning = "fixed"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or (self.batch is not None and self.batch < 1) or self.lr <= 0 or self.temperature <= 0:
            raise CompressError(f"epochs must be at least 0, batch at least 1, lr and temperature above 0, got {self}")
        if not 0 <= self.distil <= 1 or not 0 <= self.warm < 1:
            raise CompressError(f"distil must lie within [0, 1] and warm within [0, 1), got {self.distil} and {self.warm}")
        if self.weight_steps not in ("fixed", "lsq") or self.ranges not in LEARNING:
            raise CompressError(
                f"weight_steps must be fixed or lsq and ranges one of {LEARNING}, got {self.weight_steps!r} and {self.ranges!r}"
            )

    def rate(self, share: float) -> float:
        """The learning rate, as a share of `lr`, when this share of the steps is done."""
        if share < self.warm:
            return max(share / self.warm, 0.01)
        return 0.5 * (1 + math.cos(math.pi * (share - self.warm) / (1 - self.warm)))


def finetune(
    small: fx.GraphModule,
    dense: nn.Module,
    train: Iterable[Any],
    tuning: Tuning | None = None,
    *,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    on_step: Progress | None = None,
    keeper: Keeper | None = None,
) -> fx.GraphModule:
    """Train `small` in place, distilling from `dense` (Hinton et al. 2015), rounding in the loop; returns it in `eval` mode.

    Weights are rounded in every forward pass and their gradients go straight through. Whatever is learned besides them, the
    policy, the bytes and the device's cost do not change.

    Args:
        small: what `compress` made; any other module is trained as it is.
        train: batches `(inputs, target)`, or inputs alone, which then learn from the dense model only.
        augment: applied to the inputs (a tensor) of each batch before both models see it.
        on_step: called with `(step, steps, loss)`.
        keeper: keeps the state after each epoch, goes on where it stopped, and may end it early.

    Raises:
        DataError: there is no batch, or the loss is not finite.
    """
    tuning = tuning or Tuning()
    batches = list(train)
    if not batches:
        raise DataError("the train split is empty; fine-tuning needs at least one batch")
    if tuning.epochs == 0:
        return small
    dense.eval()
    deck = _Deck(dense, batches, tuning, asked=augment is None)
    norms = normed(small, deck.some()) if tuning.norms and deck.least >= LEAST_BATCH else nullcontext()
    with norms, learned(small, tuning.weight_steps, tuning.ranges):
        small.train()
        _train(small, dense, deck, tuning, augment, on_step, keeper)
        small.eval()
    return small


def _train(
    small: nn.Module, dense: nn.Module, deck: "_Deck", tuning: Tuning,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None, on_step: Progress | None, keeper: Keeper | None,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(tuning.seed)
    groups = _parameters(small, tuning)
    parameters = [p for group in groups for p in group["params"]]
    steps = tuning.epochs * len(deck)
    optimiser = torch.optim.AdamW(groups, lr=tuning.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: tuning.rate(step / steps))
    training = Training(small, optimiser, schedule, generator)
    done = 0 if keeper is None else keeper.begin(training, len(deck), tuning.epochs)
    for epoch in range(done, tuning.epochs):
        for step, (inputs, target, known) in enumerate(deck.deal(generator), epoch * len(deck) + 1):
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
        if keeper is not None and not keeper.end(training):
            break


def _parameters(small: nn.Module, tuning: Tuning) -> list[dict[str, Any]]:
    """What is trained, in the optimiser's groups: matrices, filters and clipping levels decay, nothing else does."""
    levels = {id(m.stretch) for m in small.modules() if isinstance(m, Quantizer) and m.clipped_only}
    trained = [p for p in small.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1 or id(p) in levels]
    rest = [p for p in trained if p.dim() <= 1 and id(p) not in levels]
    return [{"params": decayed, "weight_decay": tuning.weight_decay}, {"params": rest, "weight_decay": 0.0}]


class _Deck:
    """The training examples and what the dense model says to them, dealt anew each epoch where inputs and targets are tensors."""

    def __init__(self, dense: nn.Module, batches: Sequence[Any], tuning: Tuning, *, asked: bool) -> None:
        self.pairs = [batch_of(item) for item in batches]
        self._dense, self._asked = dense, asked
        tensors = all(isinstance(x, Tensor) and isinstance(y, Tensor) for x, y in self.pairs)
        self.whole = tensors and tuning.batch is not None
        if self.whole:
            inputs, targets = torch.cat([x for x, _ in self.pairs]), torch.cat([y for _, y in self.pairs])
            self.examples = inputs, targets
            self.count = -(-len(inputs) // (tuning.batch or 1))
            self.least = len(inputs) // self.count
        else:
            self.count = len(self.pairs)
            self.least = min(_length(x) for x, _ in self.pairs)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.count

    @cached_property
    def answers(self) -> list[Tensor] | None:
        """What the dense model says to each batch, asked once, where a row answers each example."""
        if not self._asked:
            return None
        found = [_answer(self._dense, x) for x, _ in self.pairs]
        fits = all(isinstance(x, Tensor) and len(x) == len(y) for (x, _), y in zip(self.pairs, found, strict=True))
        return found if fits else None

    def some(self) -> list[Any]:
        """The inputs of the first batches: `SOME` examples, or all."""
        found, count = [], 0
        for inputs, _ in self.pairs:
            found.append(inputs)
            count += _length(inputs)
            if count >= SOME:
                break
        return found

    def deal(self, generator: torch.Generator) -> Iterator[tuple[Any, Any, Tensor | None]]:
        """One epoch of inputs, targets and answers, in a new order."""
        answers = self.answers
        if self.whole:
            inputs, targets = self.examples
            known = None if answers is None else torch.cat(answers)
            for chosen in torch.tensor_split(torch.randperm(len(inputs), generator=generator), self.count):
                yield inputs[chosen], targets[chosen], None if known is None else known[chosen]
        else:
            for index in torch.randperm(self.count, generator=generator).tolist():
                yield *self.pairs[index], None if answers is None else answers[index]


def _length(inputs: Any) -> int:
    """Examples in a batch of inputs."""
    return next((len(x) for x in torch.utils._pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()), 0)


def _answer(dense: nn.Module, inputs: Any) -> Tensor:
    args, kwargs = arguments(inputs)
    with torch.no_grad():
        return first_tensor(dense(*args, **kwargs))


def _loss(out: Tensor, teacher: Tensor, target: Any, tuning: Tuning) -> Tensor:
    flat, soft = out.reshape(-1, out.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    t = tuning.temperature
    distilled = F.kl_div(F.log_softmax(flat / t, 1), F.log_softmax(soft / t, 1), reduction="batchmean", log_target=True) * t * t
    labelled = isinstance(target, Tensor) and not target.is_floating_point() and target.numel() == len(flat)
    if not labelled or tuning.distil == 1:
        return distilled
    return tuning.distil * distilled + (1 - tuning.distil) * F.cross_entropy(flat, target.reshape(-1))
