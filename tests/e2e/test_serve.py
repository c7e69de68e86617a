"""`vllm serve --quantization qwantize` as a user starts it, asked through the OpenAI client."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import openai
import pytest

from .engine import PATIENCE, end_session, server_environment

pytestmark = pytest.mark.e2e

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


class Server:
    """A running `vllm serve` and its log."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, port: int) -> None:
        self.process, self.log, self.url = process, log, f"http://127.0.0.1:{port}"

    def lines(self, text: str) -> list[str]:
        """The lines of the log that hold `text`."""
        return [line for line in self.log.read_text(errors="replace").splitlines() if text in line]

    def engines_that_answered(self) -> int:
        """How many have answered a request to the length that was asked for."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=PATIENCE) as answer:
            lines = answer.read().decode().splitlines()
        counts = [line for line in lines if line.startswith("vllm:request_success_total") and 'reason="length"' in line]
        return sum(float(line.split()[-1]) > 0 for line in counts)

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.is_healthy():
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-5000:]
            assert time.monotonic() < deadline, "the server did not become healthy"
            time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def serve(folder: Path, checkpoint: Path, *options: str, env: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Start `vllm serve` in a session of its own; nothing of it is left on leaving the block."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", checkpoint, "--quantization", "qwantize"]
    with launch(folder, command, *options, env=env) as server:
        yield server


@contextlib.contextmanager
def launch(
    folder: Path, command: Sequence[str | Path], *options: str, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """As `serve`, of any command that takes options of `vllm serve`."""
    port, log = free_port(), folder / "server.log"
    address = ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    environment = server_environment({"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **(env or {})})
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*map(str, command), *address, *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield Server(process, log, port)
    finally:
        end_session(process.pid, grace=0)
        process.wait()


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(
        tmp_path_factory.mktemp("serve"), smollm2, "--max-model-len", "512", "--served-model-name", "smollm2"
    ) as server:
        server.wait_until_healthy()
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    import httpx

    direct = httpx.Client(trust_env=False)  # a configured proxy cannot reach 127.0.0.1
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE, http_client=direct)


def test_completion(client):
    answer = client.completions.create(model="smollm2", prompt="The capital of France is", max_tokens=8, temperature=0)
    assert answer.choices[0].text.startswith(" Paris")
    assert answer.usage.completion_tokens == 8


def test_chat(client):
    answer = client.chat.completions.create(model="smollm2", messages=QUESTION, max_tokens=32, temperature=0)
    assert "Paris" in answer.choices[0].message.content


def test_streamed_chat_joins_to_the_answer_given_at_once(client):
    ask = {"model": "smollm2", "messages": QUESTION, "max_tokens": 32, "temperature": 0}
    chunks = list(client.chat.completions.create(**ask, stream=True))
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks]
    whole = client.chat.completions.create(**ask).choices[0]
    assert len([delta for delta in deltas if delta]) > 1
    assert "".join(deltas) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason


def test_log_holds_one_summary(server):
    (summary,) = server.lines("qwantize summary:")
    assert "summary: 120 layers quantized to NVFP4 (optimal, blocks of 16), 2 left" in summary


# Runs last: it stops the server that the tests above ask.
def test_sigterm_ends_server_and_leaves_no_process(server):
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(PATIENCE)
    assert end_session(server.process.pid) == []
    assert server.process.returncode == 0
    assert server.lines("Application shutdown complete")


@pytest.mark.slow
def test_nan_in_a_weight_ends_server(broken, tmp_path):
    """Through all of vLLM's own processes: the message reaches the user, and nothing hangs."""
    with serve(tmp_path, broken, "--skip-tokenizer-init", "--max-model-len", "256") as server:
        assert server.process.wait(PATIENCE) != 0
        assert end_session(server.process.pid) == []
        assert server.lines("model.layers.1.mlp.gate_up_proj: weight (512, 128) holds 3 NaN and 2 infinite elements")
