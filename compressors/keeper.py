"""Fine-tuning that survives being killed: its state after every epoch, in a safetensors file of our own."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tightrope.spaces.errors import CompressError, DataError
from tightrope.spaces.policy import write_atomically

log = logging.getLogger(__name__)
VERSION = "1"


@dataclass(frozen=True)
class Training:
    """What changes while a module is trained."""

    module: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    generator: torch.Generator

    def state(self) -> dict[str, Tensor]:
        """Weights, the optimiser's moments and the generator, as plain tensors."""
        found = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        for index, moments in self.optimiser.state_dict()["state"].items():
            found |= {f"optimiser.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
        found["generator"] = self.generator.get_state()
        return {name: value.detach().clone().contiguous() for name, value in found.items()}

    def load(self, state: dict[str, Tensor], steps: int) -> None:
        """Go on where `state` was taken, `steps` steps into the schedule.

        Raises:
            CompressError: it is the state of another module.
        """
        weights: dict[str, Tensor] = {}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            kind, _, rest = name.partition(".")
            if kind == "module":
                weights[rest] = value
            elif kind == "optimiser":
                index, _, moment = rest.partition(".")
                moments.setdefault(int(index), {})[moment] = value
        try:
            self.module.load_state_dict(weights)
            groups = self.optimiser.state_dict()["param_groups"]
            self.optimiser.load_state_dict({"state": moments, "param_groups": groups})
            self.generator.set_state(state["generator"])
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise CompressError(f"this is the state of another module: {str(error).splitlines()[0]}") from error
        self.schedule.last_epoch = steps
        rates = zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        for group, (base, share) in zip(self.optimiser.param_groups, rates, strict=True):
            group["lr"] = base * share(steps)


@dataclass
class Keeper:
    """Writes the state down after each epoch, has it judged, and says whether to go on.

    Args:
        path: of the file; where it holds epochs of the same `mark`, fine-tuning goes on behind them.
        mark: what the state depends on: another one is not gone on with.
        judge: a score of the module, higher is better; asked once after each epoch, when the module is in `eval` mode.
        go_on: called with the epochs done and the last score, for those of the file too; False ends it there.
    """

    path: Path
    mark: str
    judge: Callable[[nn.Module], float]
    go_on: Callable[[int, float], bool] = lambda done, score: True
    scores: list[float] = field(default_factory=list)

    def begin(self, training: Training, steps: int, epochs: int) -> int:
        """Restore what the file holds; the epochs done, or all `epochs` where that was the end. `steps` are those of an epoch."""
        self.scores = []
        held = self._read()
        if held is None:
            return 0
        state, scores = held
        training.load(state, steps * len(scores))
        for score in scores:
            self.scores.append(score)
            if not self.go_on(len(self.scores), score):
                return epochs
        return len(self.scores)

    def end(self, training: Training) -> bool:
        """Keep the epoch that was finished; whether to go on."""
        mode = training.module.training
        score = self.judge(training.module.eval())
        training.module.train(mode)
        self.scores.append(score)
        about = {"version": VERSION, "mark": self.mark, "scores": json.dumps(self.scores)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, save(training.state(), about))
        return self.go_on(len(self.scores), score)

    def _read(self) -> tuple[dict[str, Tensor], list[float]] | None:
        """State and scores of the file; None where there is none that fits."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                about = file.metadata() or {}
                scores = json.loads(about.get("scores", "null"))
                if about.get("version") != VERSION or about.get("mark") != self.mark or not isinstance(scores, list):
                    log.info("%s is of another fine-tuning, which begins anew", self.path)
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}, [float(s) for s in scores]  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise DataError(f"{self.path} cannot be read ({error}); remove it to fine-tune anew") from None


def epochs_of(path: Path) -> int:
    """Epochs that a file of fine-tuning holds; 0 where there is none."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        return len(json.loads((file.metadata() or {}).get("scores", "[]")))
