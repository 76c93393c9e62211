"""Several processes at one run. All that Lethe knows of ranks and shards is in this file.

`lethe unlearn --devices N`, torchrun, `accelerate launch` or Slurm start N processes (ranks), each with one device. All execute
the same code with the same settings:

    from_first          a value that rank 0 determines; it alone writes files       share     this process's part of some work
    total, gather       values of all processes, added or listed                    uneven    loops of different length

`ddp`: each process holds the whole model, and gradients are averaged (`averaged`, DistributedDataParallel). `fsdp`: each
process holds a part of every parameter (`sharded_loading`, FSDP2 by transformers). A block's parameters are gathered while it
computes. Frozen weights are sharded too, while adapters, which are small, are whole and averaged.

    whole, put          between a sharded parameter and its whole value             orthogonal_updates    Muon on shards

`runs/together.py` starts the processes of a setting `devices`, and `runs/peers.py` ends them all when one is lost.
With one process, every function is the plain thing that it replaces. torch is imported where it is needed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from lethe.errors import LetheError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")
HOURS = 2
"""How long a process waits for the others before PyTorch gives up. A lost one is found earlier, by `runs/peers.py`."""
SECONDS_TO_SPEAK = 3


def world() -> int:
    """Number of processes at this run."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def local_world() -> int:
    """Number of those processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or world()) if world() > 1 else 1


def processes(devices: int | None) -> int:
    """Number of processes that a run with this setting `devices` has, also before they are started."""
    return world() if world() > 1 else devices or 1


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK") or 0) if world() > 1 else 0


def is_first() -> bool:
    """Whether this process writes the run's files and speaks to the user."""
    return rank() == 0


def is_of_another(error: BaseException) -> bool:
    """Whether an error says, in the words of gloo or NCCL, that another process has ended."""
    return world() > 1 and any(words in str(error) for words in ("by peer", "remote process exited"))


def has_last_word() -> bool:
    """Whether this process tells the user why it ends. The others wait: when one ends, torchrun stops the first as well."""
    if not is_first():
        time.sleep(SECONDS_TO_SPEAK)
    return is_first()


def be_one_of(rank: int, processes: int, local_rank: int, local_processes: int, address: str, port: int) -> None:
    """Make this process one of several that were started without PyTorch's launcher, as that launcher would.

    `local_…`: among those on this machine. `address` and `port`: where rank 0 waits for the others.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR=address, MASTER_PORT=str(port))
    os.environ.update(LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE=str(local_processes))


def refuse_other_engines() -> None:
    """Refuse settings of `accelerate launch` that Lethe does not follow.

    Raises:
        LetheError: it would shard the model, or compute in another type, behind the recipe's back.
    """
    for name in (f"ACCELERATE_USE_{engine}" for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")):
        if os.environ.get(name, "false").lower() in {"true", "1"}:
            raise LetheError(f"{name}: Lethe does not use this engine of accelerate; set parallel: fsdp, and launch without it")
    if (kind := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        raise LetheError(f"accelerate launch: mixed precision {kind} is not used; set dtype in the recipe, and launch with no")


@functools.cache
def start() -> None:
    """Join the other processes, once; does nothing for one process."""
    refuse_other_engines()  # Trainer would follow them with one process too
    if world() == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):  # of torchrun with one process
            os.environ.pop(name, None)
        return
    import torch
    from torch import distributed as dist

    if torch.cuda.is_available():
        number, count = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
        if number >= count > 1:
            raise LetheError(f"torchrun: {local_world()} processes were started, but there are {count} GPUs; start fewer")
        if count == 1:  # each process sees its own GPU alone; transformers takes the one of this number
            os.environ["LOCAL_RANK"] = "0"
        torch.cuda.set_device(number if count > 1 else 0)
    elif sys.platform == "linux":  # glibc would not give the memory of gathered weights back, several times a model
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
    if not dist.is_initialized():
        dist.init_process_group(backend(), timeout=timedelta(hours=HOURS))
        atexit.register(_leave)


def _leave() -> None:
    """End the groups and their threads while Python still works: later, a thread of theirs would abort the process."""
    from torch import distributed as dist

    _control.cache_clear()
    gc.collect()  # sharded models refer to their groups
    if dist.is_initialized():
        dist.destroy_process_group()


def backend() -> str | None:
    """The library that carries what the processes exchange; None for one process."""
    import torch

    if world() == 1:
        return None
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def device() -> torch.device:
    """The device of this process: its GPU if there is one, else the CPU."""
    import torch

    start()
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def from_first(function: Callable[[], T]) -> T:
    """What `function` returns or raises in rank 0, in every process."""
    if world() == 1:
        return function()
    from torch import distributed as dist

    start()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error if isinstance(error, LetheError | OSError) else RuntimeError(f"{type(error).__name__}: {error}")
            dist.broadcast_object_list(outcome, group=_control())
            raise
    dist.broadcast_object_list(outcome, group=_control())
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather(value: T) -> list[T]:
    """The values of all processes, by rank."""
    if world() == 1:
        return [value]
    from torch import distributed as dist

    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value, group=_control())
    return found


def total(values: Sequence[float]) -> list[float]:
    """The sums over all processes of a few numbers."""
    if world() == 1:
        return list(values)
    import torch
    from torch import distributed as dist

    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, group=_control())
    return tensor.tolist()


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes."""
    if world() > 1:
        from torch import distributed as dist

        for tensor in tensors:
            dist.all_reduce(tensor)


def same_as_first(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by that of rank 0."""
    if world() > 1:
        from torch import distributed as dist

        for tensor in tensors:
            dist.broadcast(tensor, 0)


def share(work: Sequence[T]) -> Sequence[T]:
    """This process's part of a list: every N-th item."""
    return work[rank() :: world()]


@functools.cache
def _control() -> Any:
    """The processes as a group that exchanges small messages on the CPU, also where tensors go through NCCL."""
    from torch import distributed as dist

    start()
    return dist.new_group(backend="gloo", timeout=timedelta(hours=HOURS))


# Training


def averaged(model: nn.Module, loss: Callable[..., Any], may_miss: bool, later: bool) -> nn.Module | None:
    """A module that computes `loss(model, …)` and averages the gradients of `model` over the processes.

    None for one process. FSDP2 averages those of sharded parameters itself. `may_miss`: some parameters may get no gradient in
    the pass that averages, the last one of a batch. `later`: gradients are added up after all passes, not by this module.
    """
    import torch
    from torch.nn.parallel import DistributedDataParallel

    if world() == 1:
        return None

    module: Any = torch.nn.Module()
    module.model, module.forward = model, lambda *text: loss(model, *text)
    gathered_away(model)
    if later or all(is_sharded(p) for p in model.parameters() if p.requires_grad):
        return module
    return DistributedDataParallel(module, init_sync=False, broadcast_buffers=False, find_unused_parameters=may_miss)


# Sharded models


def sharded_loading(blocks: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` for FSDP2: each process reads its part of each parameter.

    Args:
        blocks: the name of the list of blocks, such as "gpt_neox.layers".
    """
    from transformers.distributed import DistributedConfig

    start()
    return {"distributed_config": DistributedConfig(fsdp_size=world(), fsdp_plan={f"{blocks}.*": "free_full_weight"})}


def shard(model: nn.Module, blocks: str) -> None:
    """Shard a model that every process holds whole, as `sharded_loading` does."""
    from torch.distributed.fsdp import fully_shard

    for block in model.get_submodule(blocks).children():
        fully_shard(block)
    fully_shard(model)


class Enough(Exception):
    """Ends a forward pass early. `output` is the last tensor that is needed."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = output


def may_end_early(model: nn.Module) -> None:
    """Let forward passes of a sharded model end in `Enough`: FSDP2's hooks after the pass have to run even then."""
    forward = model.forward

    @functools.wraps(forward)
    def until_enough(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except Enough as enough:
            return (enough.output,)

    model.forward = until_enough


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a part of one, with the other parts in other processes."""
    return world() > 1 and hasattr(tensor, "device_mesh")


def gathered_away(model: nn.Module) -> None:
    """Free the parameters that FSDP2 keeps gathered after a pass, so that a model's parameters are its parts again."""
    for module in sharded_modules(model):
        module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The whole value of a tensor. Every process has to call it."""
    found: Any = tensor
    return found.full_tensor() if is_sharded(tensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; it shares the tensor's memory."""
    found: Any = tensor
    return found.to_local() if is_sharded(tensor) else tensor


def put(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in the form of `like`, which may be sharded. Every process has the whole value."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    place: Any = like
    return distribute_tensor(value.to(like.device), place.device_mesh, place.placements, src_data_rank=None)


@contextlib.contextmanager
def uneven(model: nn.Module, idle: Callable[[], Any]) -> Iterator[None]:
    """Inside, processes may run different numbers of forward passes of a sharded model.

    All processes gather a sharded model's parameters together. So a process that is done joins the passes of the others with
    `idle`, a pass over any tokens that reads the same layers.
    """
    if not sharded_modules(model):
        yield
        return
    passing = True

    def announce(module: nn.Module, args: Any) -> None:
        if passing:
            total([1.0])

    handle = sharded_modules(model)[0].register_forward_pre_hook(announce, prepend=True)
    try:
        yield
        passing = False
        while total([0.0])[0]:
            idle()
    finally:
        handle.remove()


def orthogonal_updates(
    updates: Sequence[Tensor], matrices: Sequence[Tensor], orthogonalise: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """`orthogonalise` of the update of each whole matrix; of sharded ones, `updates` and the result are this process's parts.

    There are at most as many matrices as processes. Each process gathers and computes one of them.
    """
    if not updates or not is_sharded(matrices[0]):
        return [orthogonalise(update) for update in updates]
    import torch
    from torch import distributed as dist

    mine = None
    for owner, (update, matrix) in enumerate(zip(updates, matrices, strict=True)):
        part = _rows(update, -(-len(matrix) // world()))
        parts = [torch.empty_like(part) for _ in range(world())] if owner == rank() else None
        dist.gather(part, parts, dst=owner)
        if parts is not None:
            mine = orthogonalise(torch.cat(parts)[: len(matrix)]).to(update.dtype)
    results = []
    for owner, (update, matrix) in enumerate(zip(updates, matrices, strict=True)):
        rows = -(-len(matrix) // world())
        result = update.new_empty(rows, *update.shape[1:])
        parts = list(_rows(mine, rows * world()).chunk(world())) if owner == rank() and mine is not None else None
        dist.scatter(result, parts, src=owner)
        results.append(result[: len(update)])
    return results


def _rows(matrix: Tensor, rows: int) -> Tensor:
    """The matrix with zeros below it, so that it has so many rows."""
    return matrix.new_zeros(rows, *matrix.shape[1:]).slice_scatter(matrix, 0, 0, len(matrix))


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules that FSDP2 gathers as a unit, the whole model first; none if the model is not sharded."""
    if world() == 1:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
