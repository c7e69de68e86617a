#!/usr/bin/env python3
"""Serve a small model with `--quantization qwantize`, ask it a question, show what the quantization did.

    make quickstart          (or, once `make env` has run: .venv/bin/python scripts/quickstart.py --prompt "…")

Nothing that this script starts is left running, however it ends.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from bootstrap import has_gpu, say
from child_processes import exit_on_signals, process_group

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
CHECKPOINT = ROOT / ".cache" / "smollm2-135m-instruct"
LOG = ROOT / ".cache" / "quickstart-server.log"


class QuickstartError(Exception):
    """Something went wrong that the message explains."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="What is the capital of France?", help="the question to ask")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that the server may take to start")
    arguments = parser.parse_args()

    exit_on_signals()
    try:
        prepare_checkpoint()
        serve_and_ask(arguments.prompt, arguments.timeout)
    except QuickstartError as error:
        sys.exit(f"error: {error}")


def prepare_checkpoint() -> None:
    if CHECKPOINT.exists():
        say(f"checkpoint: {CHECKPOINT} is there")
        return
    say("checkpoint: turning SmolLM2-135M-Instruct from GGUF into bf16 safetensors, once, about half a minute")
    with process_group([sys.executable, str(ROOT / "scripts" / "smollm2_checkpoint.py"), str(CHECKPOINT)]) as process:
        if process.wait():
            raise QuickstartError("the checkpoint could not be made: see above")


def serve_and_ask(prompt: str, timeout: float) -> None:
    port = free_port()
    command = serve_command(port)
    say(f"starting the server, its log in {LOG}:\n    {' '.join(command)}")
    with (
        LOG.open("w") as log,
        process_group(command, env=server_environment(), stdout=log, stderr=subprocess.STDOUT) as server,
    ):
        wait_until_healthy(server, f"http://127.0.0.1:{port}/health", timeout)
        say(f"asking: {prompt}")
        ask(f"http://127.0.0.1:{port}/v1", prompt)
        say("what the quantization did, from the server's log:")
        print("".join(f"    {line}\n" for line in load_summary()), end="", flush=True)
        say("stopping the server")
    say("done: the server has stopped. serve_examples/ shows how to go on from here")


def serve_command(port: int) -> list[str]:
    # Eager, and below no torch.compile: a minute less to start, and on CPU no need of a C++ compiler.
    return (
        [str(BIN / "vllm"), "serve", str(CHECKPOINT), "--quantization", "qwantize"]
        + ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048", "--enforce-eager"]
        + (["--gpu-memory-utilization", "0.5"] if has_gpu() else [])
    )


def server_environment() -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"}  # the former in GiB, and only on CPU
    return {**os.environ, **offline, **small, "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def wait_until_healthy(server: subprocess.Popen[str], url: str, timeout: float) -> None:
    started = time.monotonic()
    next_message = 10
    while (waited := time.monotonic() - started) < timeout:
        if server.poll() is not None:
            raise QuickstartError(f"the server ended with status {server.returncode}. {log_tail()}")
        if healthy(url):
            say(f"the server is healthy after {waited:.0f} s")
            return
        if waited >= next_message:
            say(f"waiting for the server, {waited:.0f} s so far")
            next_message += 10
        time.sleep(0.5)
    raise QuickstartError(f"the server did not become healthy within {timeout:.0f} s. {log_tail()}")


def healthy(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a configured proxy cannot reach 127.0.0.1
    try:
        with direct.open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def ask(base_url: str, prompt: str) -> None:
    """Through the OpenAI client, by the example that shows how."""
    client = ROOT / "serve_examples" / "chat_client.py"
    command = [sys.executable, str(client), "--base-url", base_url, "--prompt", prompt, "--temperature", "0"]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    with process_group(command, env=environment) as process:
        if process.wait():
            raise QuickstartError(f"the question got no answer: see above. {log_tail()}")


def load_summary() -> list[str]:
    """The log's messages that begin with `qwantize`, without vLLM's prefix of process, level, time and place."""
    messages = (re.sub(r"^.*?\.py:\d+\] ", "", line) for line in LOG.read_text(errors="replace").splitlines())
    summary = [message for message in messages if message.startswith("qwantize")]
    if not summary:
        raise QuickstartError(f"the server answered, but its log holds no summary of the quantization: see {LOG}")
    return summary


def log_tail(lines: int = 30) -> str:
    tail = LOG.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join([f"The end of its log, {LOG}:", *(f"    {line}" for line in tail)])


if __name__ == "__main__":
    main()
