"""Ends a run once it exceeds its budget, and keeps the last weights within the budget; or once the model is restored.

    on_step_end -> measure(model) -> `budget.values` in run.json -> within: keep the weights; else, or if restored: stop
    after training -> restore: the model has the weights that were kept last

The weights are kept in a file (`saves.keep`), so that they survive a kill. A resumed run repeats the checks of the updates that
it repeats.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback

from lethe import distributed
from lethe.errors import LetheError
from lethe.files import sha256
from lethe.runs.run import Run
from lethe.training import saves
from lethe.training.cost import add_seconds

Measure = Callable[[nn.Module], dict[str, float]]
"""The values that a budget limits, by name, of the model as it is."""


class Budget(TrainerCallback):
    """Checks every `every` updates, and at the last one. `limits`: the highest allowed values of what `measure` returns.

    `restored`: the value of this name from which on the run is over; None: it goes on to its last update.
    """

    def __init__(self, run: Run, limits: dict[str, float], restored: float | None, measure: Measure, every: int):
        self.run, self.limits, self.restored, self.measure, self.every = run, limits, restored, measure, every
        self.folder = run.path / "saves"

    @property
    def record(self) -> dict[str, Any]:
        """`budget` in run.json: `every`, `values` by step, `kept_step` with its hash, and `stopped_at` with the reason."""
        return self.run.record.get("budget") or {}

    @property
    def kept_step(self) -> int:
        """The update whose weights are the result so far."""
        return self.record["kept_step"]

    def begin(self, model: nn.Module) -> None:
        """Keep the weights from before the first update, for a run whose first check is outside the budget."""
        self.run.update(budget={"every": self.every, "values": {}, "stopped_at": None, "reason": None})
        self._keep(0, model)

    def resume(self, done: int) -> bool:
        """Drop the checks after update `done`, which are repeated. Returns whether the run had stopped by then."""
        values = {step: found for step, found in self.record.get("values", {}).items() if int(step) <= done}
        stopped = self.record.get("stopped_at")
        ended = stopped is not None and stopped <= done
        self.run.update(budget={"values": values} | ({} if ended else {"stopped_at": None, "reason": None}))
        return ended

    def on_step_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        began = time.monotonic()
        values = self.measure(model)
        self.run.update(budget={"values": self.record["values"] | {str(state.global_step): values}})
        over = [name for name, limit in self.limits.items() if not values[name] <= limit]  # not-a-number is over
        if over:
            what = {"kl": "KL(reference ‖ model) was {:.4g}", "retain": "retain accuracy had fallen by {:.4g}"}[over[0]]
            result = f"of update {self.kept_step}" if self.kept_step else "from before the first update"
            limit = f"above budget.{over[0]} {self.limits[over[0]]:g}; the result is the weights {result}"
            self._stop(state.global_step, f"{what.format(values[over[0]])}, {limit}")
            control.should_training_stop = True
        else:
            self._keep(state.global_step, model)
            if self.restored is not None and values["restored"] <= self.restored:
                what = f"the cross-entropy on neutral text was {100 * values['restored']:.3g} % above the reference's"
                self._stop(state.global_step, f"{what}, within budget.restored {self.restored:g}")
                control.should_training_stop = True
        add_seconds(self.run, "budget", time.monotonic() - began)

    def restore(self, model: nn.Module) -> int:
        """Give the model the weights that were kept last. Returns their step.

        Raises:
            LetheError: the file with these weights is not as it was written.
        """
        file, written = saves.kept(self.folder, self.kept_step), self.record["kept_sha256"]
        if not distributed.from_first(lambda: file.is_file() and sha256(file) == written):
            raise LetheError(f"budget: '{file}', the weights within the budget, was changed or is missing; start a new run")
        saves.load_weights(file, model)
        return self.kept_step

    def _keep(self, step: int, model: nn.Module) -> None:
        written = saves.keep(self.folder, step, model)
        self.run.update(budget={"kept_step": step, "kept_sha256": written})
        saves.keep_only(self.folder, step)

    def _stop(self, step: int, why: str) -> None:
        self.run.update(budget={"stopped_at": step, "reason": f"at update {step} {why}"})
