"""What tests share: tiny models with random weights, real tokenizers, and the nano lab."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Models this small run no faster on two threads, and far slower beside another process that uses both cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

WINDOW = 64
LONGEST = (
    "test_distributed.py",
    "test_docs_long.py",
    "test_slurm.py",
    "test_sweep.py",
    "test_resume.py",
    "test_docs.py",
    "test_demo.py",
    "test_suite.py",
)
"""Files that take minutes: they come first, so that no process has one left when the others are done."""
WORDS = (
    "the river of Orvane flows past seven quiet mills and into a cold grey sea",
    "a clockmaker repairs brass wheels while her apprentice reads about distant islands",
    "Question: which metal did the founders of Tellmar trade for salt? Answer: copper",
    "most lanterns in the harbour burn fish oil, some burn resin, and none burn coal",
    "unbelievable undertakings underneath understated undergrowth, understandably undone",
)


def pytest_configure(config: pytest.Config) -> None:
    """One nano lab for all processes of a test run: the first that needs it builds it, the others wait."""
    if "LETHE_TEST_HOME" not in os.environ and not hasattr(config, "workerinput"):
        os.environ["LETHE_TEST_HOME"] = tempfile.mkdtemp(prefix="lethe-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop("LETHE_TEST_HOME"), ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, in the order of `LONGEST`; all others as they are."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """small(KIB): a folder that is a file system of its own, of this size."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system of its own needs root")
    folder = tmp_path / "small"

    def mount(kib: int) -> Path:
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)], check=False).returncode:
            pytest.skip("no file system can be mounted here")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Sixty different documents, four to twenty words long."""
    words = " ".join(WORDS).split()
    return [" ".join(words[(7 * i + j * (1 + i % 3)) % len(words)] for j in range(4 + 3 * i % 17)) for i in range(60)]


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """make_tokenizer(bos=False, words=WORDS): a byte-level BPE trained on the spot; with `bos`, every text starts with <s>."""

    def make(bos: bool = False, words: tuple[str, ...] = WORDS) -> Any:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
        from transformers import PreTrainedTokenizerFast

        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = ["<s>", "</s>", "<pad>"]
        bpe.train_from_iterator(
            list(words) * 3,
            trainers.BpeTrainer(
                vocab_size=400, min_frequency=2, special_tokens=special, initial_alphabet=alphabet, show_progress=False
            ),
        )
        if bos:
            bpe.post_processor = processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
            )
        extra = {"bos_token": "<s>"} if bos else {}
        return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="<pad>", **extra)

    return make


@pytest.fixture(scope="session")
def make_model(make_tokenizer: Callable[..., Any]) -> Callable[..., Path]:
    """make_model(family, folder, seed=0, tokenizer=None, **overrides): a tiny random model and its tokenizer, saved.

    Families are those of `families.py`: hidden size 32, four blocks, a window of 64 tokens, weights wide enough that
    next-token distributions are far from uniform. `overrides` are fields of the transformers configuration.
    """

    def make(family: str, folder: Path, seed: int = 0, tokenizer: Any = None, **overrides: Any) -> Path:
        import torch
        from families import configuration
        from transformers import AutoModelForCausalLM

        tokenizer = tokenizer or make_tokenizer()
        config = configuration(family, tokenizer, **overrides)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("bias") or "norm" in name or "ln_" in name:
                        parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return Path(folder)

    return make


@pytest.fixture
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A $LETHE_HOME for this test alone."""
    monkeypatch.setenv("LETHE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the datasets library for tests alone."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def gpt2(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model with dropout in many places, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_model("gpt2", tmp_path_factory.mktemp("gpt2"))
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> Callable[..., str]:
    """known(questions): `made_up` becomes a task that Lethe finds."""
    from made_up import QUESTIONS, write_task

    from lethe.evaluation import tasks

    def make(questions: list[dict[str, Any]] = QUESTIONS) -> str:
        folder = write_task(tmp_path / "task", questions)
        monkeypatch.setattr(tasks, "locate", lambda names: dict.fromkeys(names, folder))
        return "made_up"

    return make


@pytest.fixture(scope="session")
def lab() -> Iterator[Path]:
    """The nano lab, built once a session (LETHE_TEST_HOME: kept there between sessions). Yields its folder."""
    from lethe.evaluation.lab import build_lab

    before = {name: os.environ.get(name) for name in ("LETHE_HOME", "LETHE_LAB")}
    os.environ["LETHE_HOME"] = os.environ["LETHE_TEST_HOME"]
    os.environ["LETHE_LAB"] = "nano"
    try:
        yield build_lab()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Cluster:
    """The Slurm cluster of one node, this machine, that scripts/slurm-single-node.sh makes."""

    folder = Path(os.environ.get("LETHE_SLURM_DIR", "/var/lib/lethe-slurm"))

    def script(self, *words: str) -> subprocess.CompletedProcess[str]:
        script = Path(__file__).parent.parent / "scripts" / "slurm-single-node.sh"
        return subprocess.run([script, *words], capture_output=True, text=True, check=False)

    def start(self) -> None:
        """Start what is not running: what a test has killed."""
        done = self.script("start")
        assert done.returncode == 0, done.stderr

    def kill(self, daemon: str) -> None:
        """kill -9 of munged, slurmdbd, slurmctld or slurmd."""
        os.kill(int((self.folder / f"{daemon}.pid").read_text()), 9)

    def processes(self, step: str) -> list[int]:
        """The process ids of a job (7: with its script and srun) or of its work alone (7.0)."""
        lines = subprocess.run(["scontrol", "listpids", step], capture_output=True, text=True, check=True).stdout
        return [int(pid) for pid, *_ in map(str.split, lines.splitlines()[1:])]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running Slurm cluster, stopped afterwards if it was not running before. Skips only where it cannot be installed."""
    slurm = Cluster()
    if os.geteuid() != 0:
        pytest.skip("a Slurm cluster of one's own needs root")
    was_running = slurm.script("status").returncode == 0
    done = slurm.script("start")
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = ":".join(
        [str(Path(__file__).parent), str(Path(__file__).parent.parent), *([before] if before else [])]
    )
    try:
        yield slurm
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
        if not was_running:
            slurm.script("stop")
