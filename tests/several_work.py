"""What the processes of test_distributed.py do: `several_work.py FUNCTION ARGUMENTS`, started by torchrun.

With $FAIL_AT or $STOP_AT, the second process raises an error, or asks itself to stop, at this update. With $HUNG_AFTER, a
process counts as hung after so many seconds.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

import lethe
from lethe import distributed
from lethe.errors import LetheError
from lethe.maps import affine, ridge
from lethe.models import refs
from lethe.progress import quiet
from lethe.runs import peers
from lethe.runs.locks import build_once
from lethe.training.hf_trainer import HfTrainer
from lethe.training.optimizers import orthogonalise
from lethe.unlearning.frozen import Frozen


def jobs(file: str) -> None:
    """Each job is the name of a function of Lethe and its settings."""
    for name, settings in pickle.loads(Path(file).read_bytes()):
        getattr(lethe, name)(settings)


def disturb() -> None:
    """Follow the environment's settings."""
    fail, stop = (int(os.environ.get(name) or -1) for name in ("FAIL_AT", "STOP_AT"))
    peers.HUNG_AFTER = float(os.environ.get("HUNG_AFTER") or peers.HUNG_AFTER)
    plain = HfTrainer.get_batch_samples

    def disturbed(self: Any, *args: Any) -> Any:
        if distributed.rank() == 1 and self.state.global_step == fail:
            raise ValueError("made up")
        if distributed.rank() == 1 and self.state.global_step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args)

    HfTrainer.get_batch_samples = disturbed  # type: ignore[method-assign]


def sharded(name: str) -> None:
    """A sharded model holds about 1 / N of every parameter in each process, and computes what the whole model computes."""
    ref = refs.resolve(name)
    whole, part = refs.load(ref)[0], refs.load(ref, sharded=True)[0]
    for (one, a), (other, b) in zip(whole.named_parameters(), part.named_parameters(), strict=True):
        assert one == other and distributed.is_sharded(b) and not distributed.is_sharded(a)
        own = distributed.own(b)
        assert len(own) <= math.ceil(len(a) / distributed.world()) and own.numel() < a.numel()
        assert sum(distributed.gather(own.numel())) == a.numel()
        assert torch.equal(distributed.whole(b), a) and torch.equal(distributed.own(distributed.put(a, b)), own)
    with Frozen(ref, "float32").running() as teacher:
        assert all(distributed.is_sharded(p) for p in teacher.parameters())  # whatever `parallel` says of the trained model
    tokens = torch.arange(12)[None]
    assert torch.allclose(part(tokens).logits, whole(tokens).logits, atol=1e-5)
    distributed.gathered_away(part)
    assert all(distributed.is_sharded(p) for p in part.parameters())


def values() -> None:
    """What one process determines, all have; errors too. Sums, lists and shares are those of all processes."""
    rank, world = distributed.rank(), distributed.world()
    assert distributed.from_first(lambda: rank) == 0
    assert distributed.gather(rank) == list(range(world))
    assert distributed.total([1.0, rank]) == [world, world * (world - 1) / 2]
    assert sorted(n for part in distributed.gather(distributed.share(range(8))) for n in part) == list(range(8))

    def refuse() -> None:
        raise LetheError(f"of rank {rank}")

    def fail() -> None:
        raise ValueError(f"of rank {rank}")

    def load() -> None:
        if rank == world - 1:  # as on a machine that does not share the folder
            raise FileNotFoundError("made up")

    folder = Path(distributed.from_first(tempfile.mkdtemp)) / "cache"
    try:
        build_once(folder, lambda: False, lambda partial: distributed.from_first(partial.mkdir), load)
    except OSError as error:
        assert ("made up" if rank == world - 1 else "LETHE_HOME") in str(error)
    else:
        raise AssertionError

    for function, kind in ((refuse, LetheError), (fail, (ValueError, RuntimeError))):
        try:
            distributed.from_first(function)
        except kind as error:
            assert "of rank 0" in str(error)
        else:
            raise AssertionError


def joins() -> None:
    """Sums of maps and scores over all processes are those of all tokens in one process; some processes have no token."""
    rank, world, width = distributed.rank(), distributed.world(), 12
    random = torch.Generator().manual_seed(0)
    for tokens in (1000, 5 * world, 2):
        x = torch.randn(tokens, width, generator=random) * torch.logspace(0, 2, width) + 300
        y = x @ torch.randn(width, width, generator=random) + torch.randn(tokens, width, generator=random)
        given = ridge.RidgeSums(), ridge.Score()
        whole = ridge.RidgeSums(), ridge.Score()
        mine = slice(rank * tokens // world, (rank + 1) * tokens // world) if tokens > 2 else slice(rank, min(rank + 1, 2))
        for (sums, score), part in ((given, mine), (whole, slice(None))):
            for start in range(0, max(1, len(x[part])), 300):
                sums.add(x[part][start : start + 300], y[part][start : start + 300])
                score.add(y[part][start : start + 300], x[part][start : start + 300])
        given[0].join()
        given[1].join()
        assert given[0].n == given[1].n == tokens
        for a, b in zip(given[0].solve(1.0), whole[0].solve(1.0), strict=True):
            assert (a - b).norm() < 1e-4 * b.norm(), (tokens, (a - b).norm() / b.norm())
        for key, value in whole[1].result().items():
            assert math.isclose(given[1].result()[key], value, rel_tol=1e-9), (tokens, key)


def few(name: str, other: str) -> None:
    """Fit and score maps on fewer documents than processes."""
    models = [refs.load(refs.resolve(one), sharded=True)[0] for one in (name, other)]
    sequences = [list(range(5, 25)), list(range(30, 60))]

    def pairs() -> Any:
        return affine.activation_pairs(*models, sequences, [0, 2], 8, 0, lambda done: None)

    maps = affine.fit(pairs(), 0.01)
    scores = affine.score(pairs(), maps)
    assert all(one["r2"] > one["no_map_r2"] and math.isfinite(one["mse"]) for one in scores.values())
    for others in distributed.gather(maps.weight):
        assert all(torch.equal(others[layer], weight) for layer, weight in maps.weight.items())


def orthogonal() -> None:
    """Updates of sharded matrices, also with fewer rows than processes, are orthogonalised as whole ones."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.start()
    mesh, random = init_device_mesh("cpu", (distributed.world(),)), torch.Generator().manual_seed(0)

    def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
        return orthogonalise(matrix, torch.float32)

    for shapes in ([(7, 5), (2, 9), (1, 4)], [(8, 8), (5, 3)]):
        wholes = [torch.randn(*shape, generator=random) for shape in shapes]
        parts = [distribute_tensor(matrix, mesh, [Shard(0)]) for matrix in wholes]
        results = distributed.orthogonal_updates([distributed.own(p) for p in parts], parts, newton_schulz)
        for whole, part, result in zip(wholes, parts, results, strict=True):
            mine = distribute_tensor(newton_schulz(whole), mesh, [Shard(0)])
            assert result.shape == distributed.own(part).shape
            assert torch.allclose(result, distributed.own(mine), atol=1e-6)


def exchanges(name: str, other: str) -> None:
    """All that needs no run."""
    values()
    joins()
    orthogonal()
    few(name, other)


if __name__ == "__main__":
    quiet()
    disturb()
    distributed.start()
    try:
        globals()[sys.argv[1]](*sys.argv[2:])
    except LetheError as error:
        sys.exit(f"lethe: {error}")
    if dist.is_initialized():
        distributed.gather(None)
