"""`serve_examples/multi_node.sh`: one model over two machines, both of which are this one here."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from .checkpoints import write_byte_tokenizer, write_tiny
from .conftest import ROOT
from .engine import PATIENCE, end_session
from .test_serve import Server, free_port, launch

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores"),
]
OPTIONS = ["--tensor-parallel-size", "2", "--max-model-len", "128", "--dtype", "float32"]


@contextlib.contextmanager
def two_machines(folder: Path, checkpoint: Path) -> Iterator[list[Server]]:
    """A launch on each of two cores; the first has the API. Nothing of either is left on leaving the block."""
    options = [*OPTIONS, "--served-model-name", "tiny", "--master-port", str(free_port())]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # the script looks for vllm there
    with contextlib.ExitStack() as stack:
        machines = []
        for rank in ("0", "1"):
            (folder / rank).mkdir()
            command = [ROOT / "serve_examples" / "multi_node.sh", checkpoint, "2", rank, "127.0.0.1"]
            env = {"PATH": path, "VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_OMP_THREADS_BIND": rank}
            machines.append(stack.enter_context(launch(folder / rank, command, *options, env=env)))
        yield machines


def test_two_launches_quantize_their_shards_and_answer_as_one_server(tmp_path):
    checkpoint = write_tiny(tmp_path / "checkpoint")
    write_byte_tokenizer(checkpoint)
    with two_machines(tmp_path, checkpoint) as machines:
        first, second = machines
        first.wait_until_healthy()
        ask = {"model": "tiny", "prompt": "Side by side", "max_tokens": 16, "temperature": 0}
        with httpx.Client(base_url=first.url, timeout=PATIENCE, trust_env=False) as client:
            answer = client.post("/v1/completions", json=ask).json()
        assert answer["usage"]["completion_tokens"] == 16
        for machine in machines:
            assert len(machine.lines("qwantize summary: 8 layers quantized")) == 1
        for machine in machines:
            machine.process.send_signal(signal.SIGTERM)
        for machine in machines:
            machine.process.wait(PATIENCE)
        assert [end_session(machine.process.pid) for machine in machines] == [[], []]
        assert first.process.returncode == second.process.returncode == 0
