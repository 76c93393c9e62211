"""RepSelect: steps along one unlearning gradient, without the directions that it shares with other knowledge."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from lethe import distributed
from lethe.config.checks import Positive, above
from lethe.config.unlearning import BudgetSettings
from lethe.errors import LetheError
from lethe.methods.method import Losses, Need, OwnStep, Progress, Trained

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lethe.methods.method import Over
    from lethe.models.refs import ModelRef
    from lethe.unlearning.update import Gradient, Update
    from lethe.unlearning.view import View


@dataclass(kw_only=True)
class RepSelect(OwnStep):
    """Unlearn by representation selectivity (Sondej et al., https://arxiv.org/abs/2606.17168).

        forget_ce_loss = mean over forget tokens of log p(next token)
        before training:  A, B ← A, B + attack_lr · ∇ forget_ce_loss at W + B A       one epoch: an attacker that relearns
                          G = Σ over updates of ∇_W forget_ce_loss at W + B A         one epoch; then A and B are dropped
                          U, S, V = svd_lowrank(G, components),  D = 1 − min(S) / S
                          G̃ = (1 − U D Uᵀ) G (1 − V D Vᵀ)
        each update:      W ← W − lr · G̃

    W are the matrices of the MLPs, which alone are trained, each with a G and a G̃ of its own. A and B are adapters of rank
    attack_r on them. forget_ce_loss is the cross-entropy with a minus. The method reads no retain text and uses no source
    checkpoint.
    """

    lr: float = 0.05
    """Length of an update. All updates of a run are alike: half the rate and twice as many give the same result."""
    components: Positive = 512
    """Number of the largest singular directions of each matrix's gradient that are scaled down. With more, updates are smaller
    and more selective."""
    attack_lr: Annotated[float, above(0)] = 0.01
    """Learning rate of the attacker (SGD). A higher value relearns more before the gradient is taken."""
    attack_r: Positive = 8
    """Rank of the attacker's adapters."""
    max_steps: Annotated[int, above(0)] = 10
    """Number of optimizer updates, if the run stays within its budget."""
    budget: BudgetSettings | None = field(default_factory=lambda: BudgetSettings(kl=0.01, every=1))
    """What the run may cost elsewhere. The run ends when it exceeds its budget, with the last weights within it. null: no
    limit."""

    @property
    def trained(self) -> Trained:
        return Trained("mlp")

    def refuse_model(self, model: ModelRef) -> None:
        if self.components > model.width:
            raise LetheError(
                f"components: {self.components} is above the width of '{model.name}', {model.width}, the most that a matrix "
                f"has; set it to about an eighth, {max(1, model.width // 8)}"
            )

    def needs(self) -> dict[str, Need]:
        return {"forget": Need(logits=True)}

    def loss(self, text: str, view: View, progress: Progress) -> tuple[Tensor, Losses]:
        loss = -view.cross_entropy()
        return loss, {"forget_ce_loss": loss}

    def begin(self, model: nn.Module, over: Over) -> dict[str, Tensor]:
        matrices = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with attacker(model, matrices, self.attack_r, self.seed) as adapters:
            with only(adapters, matrices):
                for update in over("forget", adapters, "Relearning the forget text with an attacker"):
                    update.add(update.gradient("forget"), self.attack_lr)
            with only(matrices, adapters):
                total = summed(update.gradient("forget") for update in over("forget", matrices, "Computing the gradient"))
        found = {}
        for name, gradient in total.items():
            whole = distributed.whole(gradient)
            if not whole.isfinite().all():
                raise LetheError(f"attack_lr: with {self.attack_lr:g}, the attacker diverges; lower it")
            kept = filtered(whole, self.components, self.seed).to(matrices[name].dtype)
            found[name] = distributed.put(kept, matrices[name])
        return found

    def gradient(self, update: Update) -> Gradient:
        update.value("forget")
        return {name: distributed.put(update.given[name], p) for name, p in update.parameters.items()}


@contextlib.contextmanager
def attacker(model: nn.Module, matrices: dict[str, nn.Parameter], r: int, seed: int) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, each matrix W acts as W + B A. A [r, inputs] is random as in PEFT, B [outputs, r] is 0 at first."""
    import torch
    from torch import nn

    draws, adapters = torch.Generator().manual_seed(seed), {}
    with contextlib.ExitStack() as hooks:
        for name, weight in matrices.items():
            module = model.get_submodule(name.removesuffix(".weight"))
            outputs, inputs = weight.shape if isinstance(module, nn.Linear) else reversed(weight.shape)  # Conv1D is transposed
            kind: Any = {"dtype": torch.promote_types(weight.dtype, torch.float32)}
            a = nn.init.kaiming_uniform_(torch.empty(r, inputs, **kind), a=5**0.5, generator=draws)
            adapters[f"{name}.A"] = nn.Parameter(a.to(weight.device))
            adapters[f"{name}.B"] = nn.Parameter(torch.zeros(outputs, r, device=weight.device, **kind))
            hook = adapter_hook(adapters[f"{name}.A"], adapters[f"{name}.B"])
            hooks.callback(module.register_forward_hook(hook).remove)
        yield adapters


def adapter_hook(a: Tensor, b: Tensor) -> Any:
    """A hook that adds B A x to a module's output for x."""

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (args[0].to(a.dtype) @ a.T @ b.T).to(output.dtype)

    return add


@contextlib.contextmanager
def only(trained: dict[str, nn.Parameter], frozen: dict[str, nn.Parameter]) -> Iterator[None]:
    """Inside, gradients are computed for `trained` and not for `frozen`."""
    try:
        for parameters, wanted in ((trained, True), (frozen, False)):
            for parameter in parameters.values():
                parameter.requires_grad_(wanted)
        yield
    finally:
        for parameter in (trained | frozen).values():
            parameter.requires_grad_(True)


def summed(gradients: Iterator[Gradient]) -> Gradient:
    """The sum of gradients, in at least float32."""
    import torch

    total: Gradient = {}
    for gradient in gradients:
        for name, g in gradient.items():
            wide = torch.promote_types(g.dtype, torch.float32)
            total[name] = total[name].add_(g) if name in total else g.to(wide)
    return total


def filtered(gradient: Tensor, components: int, seed: int) -> Tensor:
    """(1 − U D Uᵀ) G (1 − V D Vᵀ): a singular value s of the largest `components` becomes (min(S) / s)² s.

    Singular values that are 0 up to rounding are left alone.
    """
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(gradient, components)
    known = s > s.max() * max(gradient.shape) * torch.finfo(s.dtype).eps
    smallest = torch.where(known, s, torch.inf).min()
    d = torch.where(known, 1 - smallest / s, 0)
    gradient = gradient - gradient @ v * d @ v.T
    return gradient - u * d @ (u.T @ gradient)
