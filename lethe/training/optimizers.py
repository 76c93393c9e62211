"""Optimizers, and which one trains each parameter.

`adamw`, `adamw_8bit` and `sgd` train all parameters. `muon` trains the hidden matrices: the linear layers inside the blocks,
fused QKV and MLP too, and the two matrices of a LoRA adapter. Embeddings, output head, norms, biases, routers and the
three-dimensional tensors of experts are then trained by AdamW. The module that holds a parameter decides its route. Its size
does not, because fused QKV and MLP matrices are as large as some embeddings.

model -> routes -> parameter groups -> one torch Optimizer        routes -> what the plan says is trained

The groups have the fields `name` and `algorithm`. With one Optimizer, one scheduler sets all learning rates, and one saved
state holds everything.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from transformers.pytorch_utils import Conv1D

from lethe import distributed
from lethe.config import OptimizerName, TrainingSettings
from lethe.models.activations import blocks
from lethe.models.adapters import left_out
from lethe.models.experts import fused, plain_linear, routers

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5
MOMENTUM = 0.95
BETAS, EPS = (0.9, 0.999), 1e-8
SHARE = 0.01
"""The plan has a warning if at least this share of the blocks' weights has no adapter, or is left to AdamW."""
STATE_BYTES: dict[OptimizerName, int] = {"adamw": 8, "muon": 4, "adamw_8bit": 2, "sgd": 0}
"""Bytes of state that each optimizer stores per trained parameter."""


@dataclass(frozen=True)
class Route:
    """Which optimizer trains a parameter, and what the parameter is."""

    name: str
    role: str
    algorithm: str
    shape: tuple[int, ...]
    transposed: bool


def routes(model: nn.Module, optimizer: OptimizerName) -> list[Route]:
    """The route of each parameter that is trained. Roles: matrix, experts, router, embedding, head, norm, bias, other."""
    no_matrix = routers(model)
    inside = {id(m) for block in blocks(model) for m in block.modules()}
    head = model.get_output_embeddings()  # type: ignore[operator]
    found = []
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for short, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:  # a tied weight has one route, under its first name
                seen.add(id(parameter))
                role = _role(module, short.rsplit(".", 1)[-1], parameter, id(module) in inside, module is head)
                if role == "matrix" and (id(module) in no_matrix or not plain_linear(module)):
                    role = "router"
                algorithm = "sgd" if optimizer == "sgd" else "muon" if optimizer == "muon" and role == "matrix" else "adamw"
                found.append(Route(short, role, algorithm, tuple(parameter.shape), isinstance(module, Conv1D)))
    return found


def layer_of(model: nn.Module) -> dict[str, str]:
    """By parameter name, the block that it is in (`"0"`, `"1"`, …), or `"outside"`."""
    owner = {id(p): str(i) for i, block in enumerate(blocks(model)) for p in block.parameters()}
    return {name: owner.get(id(p), "outside") for name, p in model.named_parameters()}


def describe(student: nn.Module, config: Any) -> dict[str, Any]:
    """Trainable parameters by layer and role, and the routes summed by algorithm and role, for the plan."""
    found, layers = routes(student, config.optimizer), layer_of(student)
    by_layer: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for route in found:
        by_layer[layers[route.name]][route.role] += math.prod(route.shape)
    return {
        "trainable_parameters": sum(math.prod(route.shape) for route in found),
        "trainable_by_layer": {layer: dict(roles) for layer, roles in by_layer.items()},
        "routing": routing_table(found),
    }


def routing_table(found: list[Route]) -> list[dict[str, Any]]:
    """The routes summed by algorithm and role: number of tensors and of parameters."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for route in found:
        row = rows.setdefault((route.algorithm, route.role), {"tensors": 0, "parameters": 0})
        row["tensors"] += 1
        row["parameters"] += math.prod(route.shape)
    return [{"algorithm": a, "role": r} | row for (a, r), row in sorted(rows.items())]


def untouched(student: nn.Module, config: Any, layers: list[int]) -> list[str]:
    """Warnings for the plan: the share of the blocks' weights that adapters leave as they are, or Muon leaves to AdamW."""
    found = []
    if config.lora and (share := left_out(student, config.lora, layers)) > SHARE and config.lora.targets != "attention":
        found.append(
            f"lora: {share:.0%} of the weights in the adapted blocks get no adapter (targets: {config.lora.targets}): "
            f"LoRA adapts linear layers, not routers, nor experts that are stored as three-dimensional tensors; "
            f"lora null trains all weights"
        )
    sizes: dict[str, int] = defaultdict(int)
    for route in routes(student, config.optimizer) if config.optimizer == "muon" else ():
        sizes[route.role] += math.prod(route.shape)
    if sizes["experts"] and (share := sizes["experts"] / (sizes["experts"] + sizes["matrix"])) > SHARE:
        found.append(
            f"muon: experts, stored as three-dimensional tensors, are trained by AdamW: {share:.0%} of the blocks' matrices"
        )
    return found


def make_optimizer(model: nn.Module, config: TrainingSettings) -> Optimizer:
    """The optimizer of a run, over the parameters that are trained.

    Weight decay is not applied to norms and biases.
    """
    parameters = dict(model.named_parameters())
    groups: dict[str, dict[str, Any]] = {}
    for route in routes(model, config.optimizer):
        decayed = route.role not in {"norm", "bias"}
        orientation = "_transposed" if route.transposed and route.algorithm == "muon" else ""
        name = f"{route.algorithm}{orientation}{'' if decayed else '_no_decay'}"
        group = groups.setdefault(name, {"name": name, "algorithm": route.algorithm, "params": []})
        group["params"].append(parameters[route.name])
        group["weight_decay"] = config.weight_decay if decayed else 0.0
        group["transposed"] = bool(orientation)
    listed = list(groups.values())
    if config.optimizer == "muon" or needs_masters(model, config.optimizer):
        return Muon(listed, lr=config.lr, newton_schulz_dtype=newton_schulz_dtype(config.newton_schulz_dtype))
    if config.optimizer == "sgd":
        return SGD(listed, lr=config.lr)
    if config.optimizer == "adamw_8bit":
        return eight_bit_adamw()(listed, lr=config.lr, betas=BETAS, eps=EPS)
    return AdamW(listed, lr=config.lr, betas=BETAS, eps=EPS, fused=True)  # unfused: a dozen calls per adapter


def needs_masters(model: nn.Module, optimizer: OptimizerName) -> bool:
    """Whether float32 master weights are needed: in a smaller type, rounding would often undo an update."""
    return optimizer != "adamw_8bit" and any(p.requires_grad and p.dtype.itemsize < 4 for p in model.parameters())


def newton_schulz_dtype(setting: str) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU, where bfloat16 matmuls are far slower."""
    if setting == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, setting)


def eight_bit_adamw() -> Callable[..., Optimizer]:
    """AdamW with 8-bit state, from torchao or bitsandbytes. `refuse_unavailable` has made sure that one is installed.

    torchao's rounds bfloat16 weights up or down at random, with the probabilities that make the mean exact. So an update that
    is smaller than a rounding step counts on average, without float32 weights.
    """
    if importlib.util.find_spec("torchao"):
        return functools.partial(importlib.import_module("torchao.optim").AdamW8bit, bf16_stochastic_round=True)
    return importlib.import_module("bitsandbytes.optim").AdamW8bit


class Muon(Optimizer):
    """Muon for groups whose `algorithm` is `muon`, AdamW or SGD for those whose `algorithm` is `adamw` or `sgd`.

    Muon (https://kellerjordan.github.io/posts/muon/): the update is Nesterov momentum, orthogonalised by five
    Newton–Schulz steps and scaled by √max(1, outputs / inputs) of the matrix. `transposed` groups have matrices of
    [inputs, outputs]. The result is that of `torch.optim.Muon`.

    Weights of a smaller type than float32 have float32 master weights in the state. An update changes the master weights,
    and the weights are rounded from them. So small updates add up, where rounding would lose each of them.
    """

    def __init__(self, params: list[dict[str, Any]], lr: float, newton_schulz_dtype: torch.dtype = torch.float32):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "algorithm": "adamw", "transposed": False})
        self.newton_schulz_dtype = newton_schulz_dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            size = distributed.world() if group["algorithm"] == "muon" else 1
            for start in range(0, len(trained), size):
                self._step(trained[start : start + size], group)
        return loss

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update as many matrices as there are processes, or one other parameter; of sharded ones, this process's part."""
        updates = []
        for parameter in parameters:
            weight, state = self._master(parameter), self.state[parameter]
            mine, gradient = distributed.own(weight), distributed.own(parameter.grad).to(weight.dtype)  # type: ignore[arg-type]
            mine.mul_(1 - group["lr"] * group["weight_decay"])
            if group["algorithm"] == "muon":
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = distributed.own(state["momentum_buffer"]).lerp_(gradient, 1 - MOMENTUM)
                updates.append(torch.lerp(gradient, buffer, MOMENTUM))
            elif group["algorithm"] == "sgd":
                mine.sub_(gradient, alpha=group["lr"])
            else:
                self._adamw(weight, gradient, state, group)
        whole = distributed.orthogonal_updates(
            updates, parameters, lambda matrix: orthogonalise(matrix, self.newton_schulz_dtype)
        )
        for parameter, update in zip(parameters, whole, strict=False):
            weight = self._master(parameter)
            outputs, inputs = reversed(weight.shape) if group["transposed"] else weight.shape
            mine = distributed.own(weight)
            mine.add_(update.to(mine.dtype), alpha=-group["lr"] * math.sqrt(max(1, outputs / inputs)))
        for parameter in parameters:
            if (weight := self._master(parameter)) is not parameter:
                parameter.copy_(weight)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the state has the type that it was saved in: torch would round float32 state to the weights' type."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, state in state_dict["state"].items():
            parameter = parameters[index]
            for name, value in state.items():
                self.state[parameter][name] = value.to(parameter.device, copy=True) if name != "step" else value.clone()

    def _master(self, parameter: Tensor) -> Tensor:
        """The weight that an update changes: the parameter itself, or its float32 master weight."""
        if parameter.dtype.itemsize >= 4:
            return parameter
        state = self.state[parameter]
        if "master" not in state:
            state["master"] = parameter.detach().float()
        return state["master"]

    def _adamw(self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "step" not in state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        state["step"] += 1
        step, own = state["step"].item(), distributed.own
        mean = own(state["exp_avg"]).lerp_(gradient, 1 - BETAS[0])
        square = own(state["exp_avg_sq"]).mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        scale = (square / (1 - BETAS[1] ** step)).sqrt_().add_(EPS)
        own(weight).addcdiv_(mean, scale, value=-group["lr"] / (1 - BETAS[0] ** step))


def orthogonalise(matrix: Float[Tensor, "rows columns"], dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
    """Roughly U Vᵀ of the matrix's singular value decomposition U S Vᵀ: five quintic Newton–Schulz steps.

    Singular values end between about 0.7 and 1.2 rather than at 1, which is as good for training.
    """
    a, b, c = NS_COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NS_STEPS):
        gram = x @ x.T
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.T if tall else x


def _role(module: nn.Module, short: str, parameter: Tensor, inside: bool, is_head: bool) -> str:
    if is_head:
        return "head"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if short == "bias":
        return "bias"
    if isinstance(module, nn.Linear | Conv1D):
        return "matrix" if inside else "head"
    if any(parameter is one for one in fused(module)):
        return "experts"
    return "norm" if parameter.ndim == 1 else "other"
