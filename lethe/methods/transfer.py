"""Checkpoint transfer: the model's activations on forget text are moved to the source's, after an affine map."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lethe.config import LAYERS, MAPPED
from lethe.config.checks import Amount, Count
from lethe.errors import LetheError
from lethe.methods.method import ForgetAndRetain, Losses, Maps, Need

if TYPE_CHECKING:
    from torch import Tensor

    from lethe.unlearning.view import View


@dataclass(kw_only=True)
class Transfer(ForgetAndRetain):
    """Unlearn by checkpoint transfer.

    An early checkpoint of the model itself, the source, had not learned the topic. On forget text the model's activations
    are moved to the source's activations, after an affine map fitted on retain text:

        cb_loss = mean over layers, tokens and dimensions of (h − (W c + b))²
        loss = remove_coef(t) · (cb_loss + forget_kl_coef · KL(source ‖ model on forget text)) + retain_coef(t) · retain loss

    h is the model's activation at a layer, c the source's, W and b the layer's map.
    """

    layers: list[int] | None = field(default_factory=lambda: list(LAYERS))
    """Layers whose activations the forget loss moves. Layer L is the residual stream after block L (from 0). Adapters
    sit on the blocks up to the last of these layers."""
    affine: str = "fit"
    """fit: fit maps on retain text before training; none: use no maps; else the folder, run or hub repository of maps."""
    affine_examples: Count = MAPPED
    """Maximum number of retain documents to fit maps on (0: all)."""
    affine_convention: Literal["auto", "block_output", "hidden_states"] = "auto"
    """Layer numbers in maps without a record. block_output: N is the output of block N; hidden_states: of block N - 1;
    auto: whichever scores better."""
    cb_scale: Literal["raw", "relative"] = "raw"
    """raw: cb_loss as it is; relative: each layer's distance is divided by the variance of its target, so that coefficients
    carry over from one model to another."""
    forget_kl_coef: Amount = 0.0
    """Weight of KL(source ‖ model) on forget text, relative to cb_loss (0: no KL)."""
    remove_coef: float = 5.0
    """Weight of the forget loss (0: no forget loss). Higher values forget more."""
    retain_coef: float = 5.0
    """Weight of the retain loss (0: no retain loss). Higher values preserve more of the other knowledge."""
    schedule: Literal["ramp", "constant"] = "ramp"
    """ramp: over the first epoch retain_coef rises from 0, and remove_coef falls by a quarter; constant: neither changes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is None:
            raise LetheError("layers: name at least one layer whose activations are moved, such as [0, 1, 2]")
        self.refuse_idle("affine_examples", when=self.affine != "fit", why="where no maps are fitted")
        self.refuse_idle("affine_convention", when=self.affine in {"fit", "none"}, why=f"with affine {self.affine}")
        self.refuse_idle("cb_scale", "forget_kl_coef", when=self.remove_coef == 0, why="while remove_coef is 0")

    def forget_need(self) -> Need:
        layers = tuple(sorted(self.layers or ()))
        relative = self.cb_scale == "relative"
        return Need("source", layers, logits=self.forget_kl_coef > 0, mapped=self.affine != "none", variance=relative)

    def forget_loss(self, forget: View) -> tuple[Tensor, Losses]:
        cb_loss = forget.distance()
        if not self.forget_kl_coef:
            return cb_loss, {"cb_loss": cb_loss}
        kl = forget.kl()
        return cb_loss + self.forget_kl_coef * kl, {"cb_loss": cb_loss, "forget_kl_loss": kl}

    @property
    def maps(self) -> Maps | None:
        if self.affine == "none" or not self.remove_coef:
            return None
        return Maps(None if self.affine == "fit" else self.affine, self.affine_examples, self.affine_convention)

    def warnings(self, plan: dict[str, Any]) -> list[str]:
        found = super().warnings(plan)
        if self.cb_scale == "raw" and plan["scale"].get("dominates", "neither") != "neither":
            found.append("cb_scale: with relative, coefficients carry over from one model to another")
        return found
