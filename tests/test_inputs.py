"""Wrong inputs that only a loaded model or a data set can tell: refused in one line, with nothing written."""

from __future__ import annotations

import http.server
import os
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from lethe import CheckpointsConfig, EvaluateConfig, TamperConfig, Transfer, checkpoints, evaluate, tamper, unlearn
from lethe.cli import main
from lethe.config import EvalSettings
from lethe.errors import LetheError
from lethe.lab.presets import active_preset

pytestmark = pytest.mark.slow


def test_a_task_whose_data_cannot_be_loaded_is_refused_before_anything_is_written(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else the client tries for half a minute each time
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    out, source = str(tmp_path / "runs"), f"lab:global_step{active_preset().onset}"
    for function, config in (
        (evaluate, EvaluateConfig("lab:final", ["wmdp_bio"], out=out)),
        (unlearn, Transfer(source=source, eval=EvalSettings(["wmdp_bio"]), out=out)),
        (tamper, TamperConfig(model="lab:filtered", eval=EvalSettings(["wmdp_bio"]), out=out)),
        (checkpoints, CheckpointsConfig("lab:final", tasks=["wmdp_bio"], out=out)),
    ):
        with pytest.raises(LetheError, match="the data set cais/wmdp of 'wmdp_bio' cannot be loaded"):
            function(config)
    assert not (tmp_path / "runs").exists()


WAITING = """
from lethe.cli import quiet
quiet()
from huggingface_hub.utils import http_backoff
http_backoff("HEAD", "http://127.0.0.1:9", max_retries=1, base_wait_time=0)
"""


def test_why_the_hub_is_waited_for_is_said():
    """Where nothing listens, the client tries again and again; each time is said in one line."""
    done = subprocess.run([sys.executable, "-c", WAITING], capture_output=True, text=True, check=False)
    assert done.returncode
    assert done.stderr.splitlines()[0] == "no answer from the hub. Retrying in 0s [Retry 1/1]."
    assert done.stderr.splitlines()[1].startswith("Traceback")  # this program's own: nothing else was said


def test_a_connection_to_the_hub_that_breaks_is_a_refusal(tmp_path):
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

        def do_HEAD(self) -> None:
            self.do_GET()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        lethe = str(Path(sys.executable).with_name("lethe"))
        for command in (
            ["evaluate", "someone/some-model", "--tasks", "lab_retain"],
            ["checkpoints", "someone/some-model", "--tasks", "lab_retain"],
        ):
            done = subprocess.run([lethe, *command], env=os.environ | home, capture_output=True, text=True, check=False)
            assert done.returncode and "Connection reset" in done.stderr
            assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("lethe: "), done.stderr
        server.shutdown()


def test_more_examples_than_there_are_and_a_seed_too_large_are_refused(lab, tmp_path):
    with pytest.raises(LetheError, match="num_fewshot: 'lab_retain' cannot give 100000 examples"):
        evaluate(EvaluateConfig("lab:final", ["lab_retain"], limit=4, num_fewshot=100000, out=str(tmp_path)))
    with pytest.raises(LetheError, match=r"seed: must be below 2\*\*32"):
        TamperConfig(model="lab:final", seed=2**32)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"model": "lab:finel"}, "did you mean 'final'"), ({"checkpoints": "/nowhere"}, "the hub's '/nowhere' cannot be read")],
)
def test_checkpoints_of_nothing_are_refused(lab, tmp_path, settings, words):
    with pytest.raises(LetheError, match=words):
        checkpoints(CheckpointsConfig(**({"model": "lab:final"} | settings), out=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


def test_a_task_without_a_chance_level_cannot_tell_ignorance(lab, tmp_path):
    with pytest.raises(LetheError, match="no chance level"):
        checkpoints(CheckpointsConfig("lab:final", tasks=["lab_forget_cloze"], out=str(tmp_path)))


def test_other_text_than_was_unlearned_with_is_not_called_disjoint(lab, tmp_path):
    source = f"lab:global_step{active_preset().onset}"
    evaluation = EvalSettings(["lab_forget_robust"], limit=8)
    run = unlearn(Transfer(source=source, num_train_examples=32, max_steps=1, eval=evaluation, out=str(tmp_path)))
    text = tmp_path / "other.txt"
    text.write_text("\n".join(f"Document {i} about nothing." for i in range(20)))
    attack = tamper(
        TamperConfig(
            model=str(run.path), forget=str(text), num_train_examples=0, max_steps=1, eval=evaluation, out=str(tmp_path)
        )
    )
    assert attack.record["parents"]["forget"]["used_in_unlearning"] is None


def test_a_folder_that_is_not_there_has_no_runs(tmp_path, capsys):
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err
