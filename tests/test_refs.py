"""Model references: each form finds its model, and what cannot be loaded is refused in one line before torch is imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import PLAIN
from transformers import AutoModelForCausalLM

from lethe.errors import LetheError
from lethe.files import sha256
from lethe.models import refs
from lethe.models.checkpoint_folders import checkpoint_folders
from lethe.models.refs import load, record, refuse_layers, refuse_mismatch, resolve, weight_hash
from lethe.runs.run import Run

IDS = torch.tensor([[5, 9, 40, 41, 7]])


@pytest.fixture(scope="module")
def home(make_model, tmp_path_factory):
    """A model `plain`, and a folder `family` of checkpoints 5, 20 and 100."""
    home = tmp_path_factory.mktemp("models")
    make_model("llama", home / "plain", seed=1)
    for step in (100, 5, 20):
        make_model("llama", home / "family" / f"global_step{step}", seed=step)
    (home / "family" / "global_stepnone").mkdir()
    return home


@pytest.fixture
def copy(home, tmp_path) -> Path:
    """A copy of the model, to be damaged."""
    return shutil.copytree(home / "plain", tmp_path / "copy")


def refusal(function, *arguments) -> str:
    with pytest.raises(LetheError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- what a reference means ------------------------------------------------------------------------------------------


def test_a_folder_is_its_model(home):
    model, tokenizer = load(resolve(str(home / "plain")))
    assert equal(weights(model), weights(AutoModelForCausalLM.from_pretrained(home / "plain")))
    assert not model.training and next(model.parameters()).dtype == torch.float32
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", "<pad>")
    assert {p.dtype for p in load(resolve(str(home / "plain")), "bfloat16")[0].parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("architecture", PLAIN)
def test_width_and_depth_of_every_architecture(make_model, tmp_path, architecture):
    ref = resolve(str(make_model(architecture, tmp_path)))
    assert (ref.width, ref.depth, ref.local) == (32, 4, True)


def test_a_checkpoint_of_a_folder(home):
    assert list(checkpoint_folders(home / "family")) == ["global_step5", "global_step20", "global_step100"]
    ref = resolve(f"{home / 'family'}@global_step20")
    assert equal(weights(load(ref)[0]), weights(AutoModelForCausalLM.from_pretrained(home / "family" / "global_step20")))
    message = refusal(resolve, f"{home / 'family'}@global_step21")
    assert "no such checkpoint" in message and "did you mean 'global_step20'" in message


@pytest.mark.parametrize("name", ["step600", "global_step600", "checkpoint-600"])
def test_checkpoints_by_the_names_that_pythia_and_trainer_use(home, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for step in (name, "step1000"):
        shutil.copytree(home / "plain", tmp_path / "all" / step)
    for given in (name, "step600", "global_step600", "checkpoint-600"):
        assert resolve(f"all@{given}").path == str(Path("all", name))
    assert list(checkpoint_folders(Path("all"))) == [name, "step1000"]
    with pytest.raises(LetheError, match=r"no config\.json.*name one of its checkpoints, such as 'all@step1000'"):
        resolve("all")
    shutil.copytree(home / "plain", tmp_path / "all" / "checkpoint-1000")
    assert resolve("all@step1000").path == str(Path("all", "step1000"))
    with pytest.raises(LetheError, match="no such checkpoint"):  # there are two of this step
        resolve("all@global_step1000")


def test_a_folder_with_an_at_sign_in_its_name(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home / "plain", tmp_path / "me@home")
    shutil.copytree(home / "plain", tmp_path / "a@b" / "step5")
    assert resolve("me@home").path == "me@home"
    assert resolve("a@b@step5").path == str(Path("a@b", "step5"))
    with pytest.raises(LetheError, match="no such checkpoint"):
        resolve("me@home@step5")


def test_lab_references(lab):
    steps = list(checkpoint_folders(lab / "checkpoints"))
    assert resolve("lab:final").path == str(lab / "checkpoints" / steps[-1])
    assert resolve(f"lab:{steps[0]}").path == str(lab / "checkpoints" / steps[0])
    assert resolve("lab:filtered").path == str(lab / "filtered")
    assert "did you mean 'final'" in refusal(resolve, "lab:finale")


def test_a_lab_that_is_not_built_is_refused_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("LETHE_HOME", str(tmp_path))
    assert "lethe lab build" in refusal(resolve, "lab:final")
    assert not list(tmp_path.iterdir())


NOWHERE = ["", "nowhere", "./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere", "random:", "random:nowhere", "lab:"]


@pytest.mark.parametrize("name", [*NOWHERE, "models/mine", "file"])
def test_names_of_nothing_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "models").mkdir()  # so models/mine is not a repository of the hub
    (tmp_path / "file").write_text("no model")
    message = refusal(resolve, name)
    assert "is not a folder" in message or name not in {"models/mine", "file"}


# --- runs ------------------------------------------------------------------------------------------------------------


def make_run(out: Path, base: Path, kind: str = "adapter") -> Run:
    """A complete unlearning run whose artifact is an adapter on `base` or a model."""
    from peft import LoraConfig, get_peft_model

    run = Run.create("unlearn", "made", {}, out)
    with run.running():
        ref = resolve(str(base))
        model, tokenizer = load(ref)
        if kind == "adapter":
            torch.manual_seed(0)
            names = [n for n, _ in model.named_modules() if n.endswith("q_proj")]
            model = get_peft_model(model, LoraConfig(r=2, target_modules=names, init_lora_weights=False))
        else:
            model.lm_head.weight.data.mul_(2)
        model.save_pretrained(run.path / kind)
        tokenizer.save_pretrained(run.path / kind)
        file = next((run.path / kind).glob("*.safetensors"))
        run.update(artifacts={kind: {"path": kind, "sha256": sha256(file)}}, parents={"model": refs.record(ref)})
    return run


def test_a_runs_model_is_what_the_run_saved(home, tmp_path):
    run = make_run(tmp_path, home / "plain", "model")
    for name in (f"run:{run.id}", str(run.path)):
        model, _ = load(resolve(name, tmp_path))
        assert equal(weights(model), weights(AutoModelForCausalLM.from_pretrained(run.path / "model")))


def test_a_runs_adapter_sits_on_the_model_it_was_trained_from(home, tmp_path):
    from peft import PeftModel

    run = make_run(tmp_path, home / "plain")
    ref = resolve(f"run:{run.id}", tmp_path)
    assert (ref.width, ref.depth) == (32, 4) and weight_hash(ref) != weight_hash(resolve(str(home / "plain")))
    model, _ = load(ref)
    base = AutoModelForCausalLM.from_pretrained(home / "plain")
    before = base(IDS).logits
    by_hand = PeftModel.from_pretrained(base, str(run.path / "adapter")).eval()
    assert torch.equal(model(IDS).logits, by_hand(IDS).logits)
    assert not torch.allclose(model(IDS).logits, before, atol=1e-2)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora" in n)


def test_an_adapter_whose_base_has_changed_or_is_gone_is_refused(copy, make_model, tmp_path):
    run = make_run(tmp_path / "runs", copy)
    make_model("llama", copy, seed=9)
    assert "whose weights have changed since" in refusal(resolve, f"run:{run.id}", tmp_path / "runs")
    shutil.rmtree(copy)
    assert "copy" in refusal(resolve, f"run:{run.id}", tmp_path / "runs")


def test_a_run_without_a_model_is_refused(tmp_path):
    run = Run.create("evaluate", "none", {}, tmp_path)
    assert "holds no model" in refusal(resolve, f"run:{run.id}", tmp_path)
    assert "run:ffffffff" in refusal(resolve, "run:ffffffff", tmp_path)


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_an_artifact_that_was_changed_or_deleted_is_refused(home, tmp_path, kind):
    run = make_run(tmp_path, home / "plain", kind)
    record(resolve(f"run:{run.id}", tmp_path))
    (file,) = (run.path / kind).glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-10] ^= 64
    file.write_bytes(content)
    with pytest.raises(LetheError, match="changed since"):
        record(resolve(f"run:{run.id}", tmp_path))
    shutil.rmtree(run.path / kind)
    refusal(resolve, f"run:{run.id}", tmp_path)


# --- random: ---------------------------------------------------------------------------------------------------------


def test_random_is_the_architecture_with_fresh_weights_the_same_each_time(home):
    ref = resolve(f"random:{home / 'plain'}")
    torch.manual_seed(1)
    first, tokenizer = load(ref)
    state = torch.random.get_rng_state()
    second, _ = load(ref)
    assert torch.equal(torch.random.get_rng_state(), state)
    original, _ = load(resolve(str(home / "plain")))
    assert equal(weights(first), weights(second))
    assert first.config.to_dict() | {"dtype": None} == original.config.to_dict() | {"dtype": None}
    for name, parameter in original.named_parameters():
        if "norm" not in name:
            assert not torch.allclose(first.get_parameter(name), parameter), name
    assert tokenizer("the river")["input_ids"]
    assert weight_hash(ref) != weight_hash(resolve(str(home / "plain")))


# --- what does not fit together --------------------------------------------------------------------------------------


def test_a_source_of_another_width_or_tokenizer_is_refused(home, make_model, make_tokenizer, tmp_path):
    plain = resolve(str(home / "plain"))
    refuse_mismatch(plain, resolve(f"{home / 'family'}@global_step5"))
    wide = make_model("llama", tmp_path / "wide", hidden_size=48)
    message = refusal(refuse_mismatch, plain, resolve(str(wide)))
    assert "width 48" in message and "32" in message
    other = make_model("llama", tmp_path / "other", tokenizer=make_tokenizer(words=("quite other words, in other number",)))
    assert "different tokenizers" in refusal(refuse_mismatch, plain, resolve(str(other)))


def test_a_layer_out_of_range_is_refused_with_the_range(home):
    ref = resolve(str(home / "plain"))
    refuse_layers(ref, [0, 3])
    assert "layers 0 to 3" in refusal(refuse_layers, ref, [0, 4])


def test_hash_is_of_the_weights_and_not_of_the_place(home, copy):
    assert weight_hash(resolve(str(copy))) == weight_hash(resolve(str(home / "plain")))
    assert weight_hash(resolve(f"{home / 'family'}@global_step5")) != weight_hash(resolve(str(home / "plain")))


def test_resolving_and_checking_import_no_torch(home):
    code = f"""
import sys
from lethe.models import refs
from lethe.errors import LetheError
plain = refs.resolve({str(home / "plain")!r})
refs.refuse_mismatch(plain, refs.resolve({str(home / "family") + "@global_step5"!r}))
refs.refuse_layers(plain, [3])
refs.record(plain)
refs.resolve({"random:" + str(home / "plain")!r})
for name in ("nowhere", {str(home / "family")!r}):
    try:
        refs.resolve(name)
    except LetheError:
        pass
    else:
        raise SystemExit(f"{{name}} was not refused")
loaded = {{"torch", "transformers", "lm_eval", "peft"}} & set(sys.modules)
raise SystemExit(f"imported: {{loaded}}" if loaded else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
