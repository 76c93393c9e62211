"""What an unlearning method is: a dataclass with its settings, what its loss compares, and the loss.

    lethe/methods/npo.py     class NPO(ForgetAndRetain): settings as fields, forget_need(), forget_loss()

A method is found by the name of its file. Its fields come beside those that every method has (`UnlearnSettings`), flat in a
recipe, on the command line and in Python. `Method` has two abstract functions. `needs()` decides which teachers are loaded,
whether a source checkpoint or affine maps are required, and what the forward passes compute. `loss()` is the loss of one text,
forget or retain, in terms of a view of it in a batch (`lethe.unlearning.view.View`). `ForgetAndRetain` writes both functions
from `forget_need()` and `forget_loss()`. Files here import torch only inside functions, so that help answers at once.
docs/extending.md adds a method step by step.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import lethe.methods
from lethe.config.checks import Amount
from lethe.config.parse import fields_of
from lethe.config.training import LoraSettings, OptimizerName
from lethe.config.unlearning import UnlearnSettings
from lethe.errors import LetheError, nearest, printable
from lethe.methods import user_file
from lethe.methods.need import HELD_OUT, Maps, Need, Progress, Trained

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lethe.models.refs import ModelRef
    from lethe.unlearning.update import Gradient, Update
    from lethe.unlearning.view import View

    Over = Callable[..., Iterator[Update]]

Losses = dict[str, "Tensor"]
DEFAULT = "transfer"
"""The method of a recipe that names none."""


@dataclass(kw_only=True)
class Method(UnlearnSettings):
    """Unlearn a topic. `--method NAME --help` lists the settings of one method."""

    method: str = DEFAULT
    """The unlearning method: the name of a file in lethe/methods, or a file of your own, such as ./mine.py. A file is Python
    code that runs with your permissions. Its path is relative to the working directory, also in a recipe."""

    scale: ClassVar[str | None] = None
    """The setting that the forget loss is multiplied by, for which the plan proposes a value; None: it proposes none.

    The proposal assumes a forget loss above 0 that has a gradient at the start.
    """
    by_document: ClassVar[tuple[str, ...]] = ()
    """Losses that are means over documents; all others are means over tokens."""

    def __post_init__(self) -> None:
        own = user_file.name_of(type(self))
        if self.method not in (DEFAULT, own) and not user_file.is_same(self.method, type(self)):
            raise LetheError(f"method: these are settings of {own}, not of {printable(self.method, 80)}")
        self.method = own if self.method == DEFAULT else self.method
        super().__post_init__()
        needs = self.needs()
        if self.needs_source and not self.source:
            raise LetheError("source: name the ignorant checkpoint, or auto; `lethe checkpoints MODEL` finds it")
        unused = f"with method {own} and rewind 0, where no source checkpoint is used"
        self.refuse_idle("source", when=not self.takes_source, why=unused)
        no_teacher = not self.compared()
        self.refuse_idle("teacher_cache", when=no_teacher, why="on a recipe that uses no teacher")
        self.refuse_idle("layers", when=not self.reads_layers, why="without adapters")
        if self.lora and self.lora.targets != "all" and self.trained.matrices != "all":
            raise LetheError(f"lora.targets: {own} adapts matrices of the MLPs of its own choice; leave it out")
        self.refuse_idle("sam", "same_sign", when=self.is_procedure, why=f"with method {own}, which computes its own gradient")
        for setting, text in (("sam", "forget"), ("same_sign", "forget"), ("same_sign", "retain")):
            self.refuse_idle(setting, when=text not in needs, why=f"on a recipe without a {text} loss")
        self.refuse_idle("layered", when=len(needs) < 2, why="on a recipe whose losses do not read both forget and retain text")

    def needs(self) -> dict[str, Need]:
        """By text, `forget` or `retain`, what the loss reads; a text that it does not read is left out.

        `__post_init__` of this class calls it, before a subclass has checked its own settings.
        """
        raise NotImplementedError

    def compared(self) -> dict[str, Need]:
        """By text, what is compared with a teacher: by the loss, and by checks of the budget on held-out text."""
        found = {text: need for text, need in self.needs().items() if need.teacher}
        limited = self.budget is not None and self.budget.reads_text
        return found | ({HELD_OUT: Need("reference", logits=True)} if limited else {})

    def need_at(self, text: str, progress: Progress) -> Need:
        """What the loss of one text reads at this point of the run: all that `needs()` says, or less."""
        return self.needs()[text]

    def loss(self, text: str, view: View, progress: Progress) -> tuple[Tensor, Losses]:
        """The loss of one text of a batch, and its parts by name for the log. What is minimised is the sum over all texts.

        `text`: a name in `needs()`. Names of parts end with `_loss`; those of parts on retain text begin with `retain_`. Values
        are the batch's share of a mean over the whole optimizer update.
        """
        raise NotImplementedError

    def begin(self, model: nn.Module, over: Over) -> dict[str, Tensor]:
        """What the method computes once, before the first update, from the model and its texts: tensors by name.

        `over(text, parameters, description, need)` goes once over a text and gives an `Update` for each group of documents.
        With `need`, views have a teacher of this need, and the model itself does not run. The run keeps the result in the file
        `method.safetensors`, and scalars in its record, too. Updates and views have it as `given`.
        """
        return {}

    def gradient(self, update: Update) -> Gradient:
        """The gradient that an optimizer update steps with, by parameter. Only a procedure defines it.

        Every other method steps with the gradient of the sum of its losses, or with what `sam` and `same_sign` make of it.
        """
        raise NotImplementedError

    @property
    def is_procedure(self) -> bool:
        """Whether the method computes the gradient of an update itself."""
        return type(self).gradient is not Method.gradient

    @property
    def by_update(self) -> bool:
        """Whether a step needs more than the gradient of the summed loss."""
        return self.is_procedure or self.sam is not None or self.same_sign

    def refuse_model(self, model: ModelRef) -> None:
        """Refuse a model that the method cannot work on, by its config.json.

        Raises:
            LetheError: names the setting and what would work.
        """

    def coefficients(self, progress: Progress) -> dict[str, float]:
        """Coefficients that change during a run, by the name of their setting, for the log and the plan."""
        return {}

    def warnings(self, plan: dict[str, Any]) -> list[str]:
        """Warnings for the plan of a run, about settings that may be a mistake."""
        return []

    @property
    def trained(self) -> Trained:
        """The weights that the method trains."""
        return Trained()

    @property
    def maps(self) -> Maps | None:
        """The affine maps that the teacher's activations go through; None: there are none."""
        return None

    @property
    def fits_maps(self) -> bool:
        """Whether affine maps are fitted before training."""
        return self.maps is not None and self.maps.given is None

    @property
    def compares_gradients(self) -> bool:
        """Whether the plan compares the gradient of the forget loss with that of the retain loss.

        The comparison needs a retain loss that is 0 at the start: the distance of an unchanged model from the reference.
        """
        retain = self.needs().get("retain")
        at_zero = retain is not None and retain.teacher == "reference" and not self.moves_start
        return self.scale is not None and at_zero and "forget" in self.needs()

    @property
    def needs_source(self) -> bool:
        """Whether a source checkpoint is loaded: as a teacher, or to rewind to."""
        return self.rewind > 0 or any(need.teacher == "source" for need in self.needs().values())

    @property
    def takes_source(self) -> bool:
        """Whether a source checkpoint would be used, if no coefficient were 0."""
        return self.needs_source

    @property
    def reads_layers(self) -> bool:
        """Whether `layers` has an effect: on a loss on activations, or on where adapters sit."""
        return self.lora is not None or any(need.layers for need in self.needs().values())

    @property
    def mapped_layers(self) -> tuple[int, ...]:
        """Layers whose affine maps the run holds."""
        return next((need.layers for need in self.needs().values() if need.mapped), ())

    @classmethod
    def title(cls) -> str:
        """The name of the method, or the path of its file."""
        return user_file.name_of(cls)

    @classmethod
    def trust(cls, given: Mapping[str, Any]) -> None:
        """The user gives these settings: if `method` is a file, it may run."""
        if user_file.is_file(given.get("method")):
            user_file.trust(given["method"])

    @classmethod
    def variant(cls, given: Mapping[str, Any]) -> type[Method]:
        """The class that has the settings of a recipe: that of its `method`.

        Raises:
            LetheError: a recipe of another method is read as one of this class.
        """
        method = given.get("method")
        if cls is Method:
            return named(method or DEFAULT)
        if method and named(method) is not cls:
            raise LetheError(f"method: the recipe is one of {method}, and not of {cls.__name__}")
        return cls

    @classmethod
    def elsewhere(cls, setting: str) -> str | None:
        """The first other method that has a setting of this name; None if no method has it."""
        return next((name for name in names() if setting in fields_of(named(name))), None)

    @classmethod
    def of_record(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a run's record under the names of today. Before 0.2.0 a recipe had `forget_loss` and no method."""
        settings = dict(given)
        before = settings.pop("forget_loss", None)
        if before is not None:
            settings["method"] = "distill" if before == "distill" else "transfer"
            settings["forget_kl_coef"] = settings.get("forget_kl_coef", 1.0) if before == "both" else 0.0
        if settings.get("packing") == "blocks":
            settings["packing"] = "packed"
        return settings


def names() -> list[str]:
    """The methods that come with Lethe, by name."""
    return sorted(
        {module.name for module in pkgutil.iter_modules(lethe.methods.__path__)}
        - {"method", "need", "user_file", "check_settings"}
    )


def named(name: str) -> type[Method]:
    """The method of that name, or in that file."""
    if user_file.is_file(name):
        return user_file.load(name, Method, ForgetAndRetain)
    if name not in names():
        raise LetheError(f"method: there is no method '{printable(name, 80)}'{nearest(str(name), names())}")
    module = importlib.import_module(f"lethe.methods.{name}")
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    )


def every() -> list[type[Method]]:
    """All methods that come with Lethe."""
    return [named(name) for name in names()]


def all_fields() -> dict[str, Any]:
    """The settings of all methods by dotted name, with their types: of those that come with Lethe, and of files in use."""
    return {name: kind for method in (*every(), *user_file.loaded()) for name, kind in fields_of(method).items()}


@dataclass(kw_only=True)
class ForgetAndRetain(Method):
    """A method whose loss is the weighted sum of a forget loss, which its file defines, and of a usual retain loss.

    Subclasses write `forget_need` and `forget_loss`.
    """

    remove_coef: Amount = 1.0
    """Weight of the forget loss (0: no forget loss). Higher values forget more."""
    retain_coef: Amount = 1.0
    """Weight of the retain loss (0: no retain loss). Higher values preserve more of the other knowledge."""
    retain_loss: Literal["kl", "ce", "mse"] = "kl"
    """kl: KL(reference ‖ model) of next tokens; ce: cross-entropy on the retain text; mse: distance from the reference's
    activations at layers."""
    schedule: Literal["ramp", "constant"] = "constant"
    """ramp: over the first epoch retain_coef rises from 0, and remove_coef falls by a quarter; constant: neither changes."""

    scale: ClassVar[str | None] = "remove_coef"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove_coef == 0 and self.retain_coef == 0:
            raise LetheError("remove_coef and retain_coef are both 0, so nothing would be trained; raise one of them")
        self.refuse_idle("retain_loss", when=self.retain_coef == 0, why="while retain_coef is 0")
        if self.layers is None and self.retain_loss == "mse":
            raise LetheError("layers: retain_loss mse compares activations; name at least one layer, such as [0, 1, 2]")

    def forget_need(self) -> Need:
        """What the forget loss reads. `Method.__post_init__` calls it, before a subclass has checked its own settings."""
        raise NotImplementedError

    def forget_loss(self, forget: View) -> tuple[Tensor, Losses]:
        """The forget loss to minimise, without remove_coef, and its parts by name for the log (names end with `_loss`)."""
        raise NotImplementedError

    def loss(self, text: str, view: View, progress: Progress) -> tuple[Tensor, Losses]:
        """remove_coef(t) · forget loss, or retain_coef(t) · retain loss. A text whose coefficient is 0 is not read."""
        remove_coef, retain_coef = self.weights(progress)
        if text == "forget":
            value, losses = self.forget_loss(view)
            return remove_coef * value, losses
        value = {"kl": view.kl, "ce": view.cross_entropy, "mse": view.distance}[self.retain_loss]()
        return retain_coef * value, {f"retain_{self.retain_loss}_loss": value}

    def needs(self) -> dict[str, Need]:
        retain = {
            "kl": Need("reference", logits=True),
            "ce": Need(logits=True),
            "mse": Need("reference", layers=tuple(sorted(self.layers or ()))),
        }[self.retain_loss]
        needs = {"forget": self.forget_need()} if self.remove_coef else {}
        return needs | ({"retain": retain} if self.retain_coef else {})

    @property
    def takes_source(self) -> bool:
        return self.needs_source or self.forget_need().teacher == "source"

    def weights(self, progress: Progress) -> tuple[float, float]:
        """remove_coef(t) and retain_coef(t).

        ramp: with s = min(1, updates done / updates of the first epoch), remove_coef · (1 − s / 4) and retain_coef · s.
        """
        if self.schedule == "constant":
            return self.remove_coef, self.retain_coef
        s = min(1.0, progress.done / progress.first_epoch)
        return self.remove_coef * (1 - 0.25 * s), self.retain_coef * s

    def coefficients(self, progress: Progress) -> dict[str, float]:
        return dict(zip(("remove_coef", "retain_coef"), self.weights(progress), strict=True))

    def warnings(self, plan: dict[str, Any]) -> list[str]:
        found = []
        if self.same_sign and self.retain_loss != "ce" and not self.moves_start:
            found.append(
                f"same_sign: the gradient of retain_loss {self.retain_loss} is 0 at the start, so that the signs of the first "
                f"update are those of rounding; retain_loss ce has signs from the start"
            )
        return found + self._schedule_warnings(plan)

    def _schedule_warnings(self, plan: dict[str, Any]) -> list[str]:
        if self.schedule == "constant" or plan["steps"] >= plan["first_epoch_steps"]:
            return []
        end = self.weights(Progress(plan["steps"] - 1, plan["first_epoch_steps"], plan["steps"]))[1]
        return [
            f"schedule: the run ends within its first epoch, so that the ramp is cut short and "
            f"retain_coef only rises to {end:g} of {self.retain_coef:g}"
        ]


@dataclass(kw_only=True)
class OwnStep(Method):
    """A procedure that trains the weights themselves, by plain steps of lr times what `gradient` returns."""

    lora: LoraSettings | None = None
    """null: the weights themselves are trained. This method trains no adapters."""
    optimizer: OptimizerName = "sgd"
    """sgd: the step of the method as it is. Others would change it."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "constant"
    """Shape of the learning rate after the warm-up."""
    max_grad_norm: Amount = 0.0
    """0: no clipping. The length of a step is the method's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_idle("lora", when=True, why=f"with method {self.method}, which trains the weights themselves")
        self.refuse_idle("optimizer", "max_grad_norm", when=True, why=f"with method {self.method}, whose step is its own")
