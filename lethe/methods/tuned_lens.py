"""Tuned-lens unlearning: on forget text, every layer's prediction of the next token becomes uniform."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lethe.config import LAYERS
from lethe.config.checks import Positive, above
from lethe.errors import LetheError
from lethe.methods.method import ForgetAndRetain, Losses, Need

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lethe.methods.method import Over
    from lethe.models.refs import ModelRef
    from lethe.unlearning.view import View

MEASURED = 0.1
"""Share of the fit's updates, the last ones, in which the lens is measured."""


@dataclass(kw_only=True)
class TunedLens(ForgetAndRetain):
    """Unlearn by maximum entropy of tuned lenses (lens: Belrose et al., https://arxiv.org/abs/2303.08112).

        lens of layer L:  z = head₀(norm₀(h + A h + b))
        lens_loss = mean over layers and forget tokens of (log Σ exp z − mean z) / ln V
        loss = remove_coef(t) · lens_loss + retain_coef(t) · retain loss

    h is the model's activation at layer L. norm₀ and head₀ are the final norm and the output head of the model before
    unlearning. A and b, one pair a layer, are fitted before training: on retain text they minimise KL(reference ‖ lens), by
    Adam, from 0. V is the size of the vocabulary. No source checkpoint is used.
    """

    layers: list[int] | None = field(default_factory=lambda: list(LAYERS))
    """Layers whose lenses are made uniform. Layer L is the residual stream after block L (from 0). Adapters sit on the blocks
    up to the last of these layers."""
    lens_lr: Annotated[float, above(0)] = 1e-3
    """Learning rate of the fit of the lens. It falls linearly to 0."""
    lens_epochs: Positive = 1
    """How often the fit of the lens reads the retain text. More epochs fit it better."""
    remove_coef: float = 5.0
    """Weight of the forget loss (0: no forget loss). Higher values forget more."""
    retain_coef: float = 5.0
    """Weight of the retain loss. Higher values preserve more of the other knowledge."""
    schedule: Literal["ramp", "constant"] = "ramp"
    """ramp: over the first epoch retain_coef rises from 0, and remove_coef falls by a quarter; constant: neither changes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise LetheError("layers: name at least one layer whose lens is made uniform, such as [0, 1, 2]")
        if self.retain_coef == 0:
            raise LetheError("retain_coef: tuned_lens fits its lens on the retain text; set it above 0")
        self.refuse_idle("lens_lr", "lens_epochs", when=self.remove_coef == 0, why="while remove_coef is 0")

    def refuse_model(self, model: ModelRef) -> None:
        if self.remove_coef and model.depth - 1 in (self.layers or ()):
            raise LetheError(
                f"layers: layer {model.depth - 1} is the last one, whose prediction is the model's own; leave "
                f"it out, or use method max_entropy"
            )

    def forget_need(self) -> Need:
        return Need("reference", layers=tuple(sorted(self.layers or ())), ending="head")

    def forget_loss(self, forget: View) -> tuple[Tensor, Losses]:
        layers = sorted(self.layers or ())
        lenses = [forget.ending(translated(forget.activation(n), n, forget.given)) for n in layers]
        loss = sum((lens.uniform_cross_entropy() for lens in lenses[1:]), lenses[0].uniform_cross_entropy()) / len(lenses)
        return loss, {"lens_loss": loss}

    def begin(self, model: nn.Module, over: Over) -> dict[str, Tensor]:
        """Fit the lens. Scalars are KL(reference ‖ lens) of each layer, and the same without A and b, on the last documents.

        Raises:
            LetheError: a layer's lens predicts no better than without A and b.
        """
        import torch

        if not self.remove_coef:
            return {}
        layers = tuple(sorted(self.layers or ()))
        lens = _untranslated(model, layers)
        need = Need("reference", layers=layers, logits=True, ending="head")
        adam = torch.optim.Adam(lens.values(), lr=self.lens_lr)
        measured: list[Losses] = []
        for epoch in range(self.lens_epochs):
            for update in over("retain", lens, "Fitting the lens", need):
                now = update.progress
                done = (epoch + now.done / now.steps) / self.lens_epochs
                last = epoch == self.lens_epochs - 1 and now.done + 1 >= (1 - MEASURED) * now.steps
                for name, gradient in update.gradient("retain", _Fit(lens, layers, last)).items():
                    lens[name].grad = gradient
                adam.param_groups[0]["lr"] = self.lens_lr * (1 - done)
                adam.step()
                measured += [update.losses] if last else []
        values = {name: torch.stack([each[name] for each in measured]).mean() for name in measured[0]}
        for n in layers:
            with_lens, without = float(values[f"kl_{n}"]), float(values[f"untranslated_kl_{n}"])
            if not with_lens <= without:
                raise LetheError(
                    f"lens_lr: the lens of layer {n} predicts no better than without its fit (KL {with_lens:.3g}, "
                    f"{without:.3g} without); lower lens_lr, or give more retain text"
                )
        return {name: parameter.detach() for name, parameter in lens.items()} | values


class _Fit:
    """The loss of the fit: mean over layers of KL(reference ‖ lens). With `measured`, also without A and b, as parts."""

    def __init__(self, lens: dict[str, Any], layers: tuple[int, ...], measured: bool):
        self.lens, self.layers, self.measured = lens, layers, measured

    def __call__(self, view: View) -> tuple[Tensor, Losses]:
        import torch

        parts = {}
        for n in self.layers:
            h = view.teacher_activation(n)
            parts[f"kl_{n}"] = view.ending(translated(h, n, self.lens)).kl()
            if self.measured:
                with torch.no_grad():
                    parts[f"untranslated_kl_{n}"] = view.ending(h).kl()
        return torch.stack([parts[f"kl_{n}"] for n in self.layers]).mean(), parts


def translated(h: Tensor, layer: int, lens: dict[str, Any]) -> Tensor:
    """h + A h + b. Before the lens is fitted, A and b are 0."""
    from torch.nn.functional import linear

    width = h.shape[-1]
    weight = lens.get(f"{layer}.weight", h.new_zeros(width, width)).to(h.dtype)
    bias = lens.get(f"{layer}.bias", h.new_zeros(width)).to(h.dtype)
    return h + linear(h, weight, bias)


def _untranslated(model: Any, layers: tuple[int, ...]) -> dict[str, nn.Parameter]:
    """A and b of each layer, all 0, in at least float32."""
    import torch

    width, like = model.config.get_text_config().hidden_size, next(model.parameters())
    zeros = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
    shapes = {"weight": (width, width), "bias": (width,)}
    return {f"{n}.{part}": torch.nn.Parameter(torch.zeros(*shape, **zeros)) for n in layers for part, shape in shapes.items()}
