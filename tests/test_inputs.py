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

import pytest

from lethe import CheckpointsConfig, TamperConfig, Transfer, checkpoints, tamper, unlearn
from lethe.cli import main
from lethe.config import EvalSettings
from lethe.errors import LetheError
from lethe.lab.presets import active_preset

pytestmark = pytest.mark.slow


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


def test_checkpoints_of_a_repository_that_does_not_exist_are_refused(lab, tmp_path):
    with pytest.raises(LetheError, match="repository '/nowhere'"):
        checkpoints(CheckpointsConfig("lab:final", checkpoints="/nowhere", out=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


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
