#!/usr/bin/env python3
"""A server under load: many streaming clients at once, some of which leave midway, malformed requests among theirs.

    .venv/bin/python scripts/load_server.py .cache/smollm2-135m-instruct --seconds 300
    .venv/bin/python scripts/load_server.py .cache/smollm2-135m-instruct --seconds 300 --kill-engine

Starts `vllm serve --quantization qwantize`, loads it, and ends with exit code 1 unless every well-formed request was
answered to its end, every malformed one refused with a status of 4xx, no request left over in the server, its memory
flat and its end clean. With --kill-engine the engine's process is killed at half time: the server must then end by
itself, and a second one, started in its place, answers. What is in flight at that moment is lost and counted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from child_processes import exit_on_signals, process_group
from quickstart import BIN, free_port, server_environment

NAME = "model"
MAX_MODEL_LEN = 512
# glibc gives large tensors back to the system when they are freed, not at some time: what stays is what is held. Bytes.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
# On a CPU a page of the KV cache takes memory when it is first written: few blocks, and all are written before
# anything is counted.
KV_BLOCKS = 128
KV_BLOCK_TOKENS = 128
PATIENCE = 300.0  # seconds for a start, an answer or an end
SAMPLE_SECONDS = 2.0
# Growth of memory from the second fifth of the samples to the last, in which a server still warms up a little.
ALLOWED_GROWTH = 0.02
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "then",
    "it",
    "runs",
    "far",
    "away",
    "from",
    "every",
    "one",
    "of",
    "us",
]


@dataclasses.dataclass
class Report:
    """What was counted. `failed`: descriptions of what must not happen; memory: MiB of all the server's processes."""

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    failed: list[str] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    memory: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def grown(self) -> float:
        """By which part memory grew from the second fifth of the samples to the last."""
        fifth = max(1, len(self.memory) // 5)
        early, late = self.memory[fifth : 2 * fifth], self.memory[-fifth:]
        return (sum(late) / len(late)) / (sum(early) / len(early)) - 1 if early else 0.0

    def show(self) -> None:
        for what, count in sorted(self.counts.items()):
            print(f"{what:>32}  {count}")
        if self.seconds:
            ordered = sorted(self.seconds)
            middle, late = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.95)]
            print(f"{'seconds to the end of an answer':>32}  {middle:.1f} (median), {late:.1f} (95 %)")
        print(f"{'tokens streamed':>32}  {self.tokens}")
        if self.memory:
            low, high = min(self.memory), max(self.memory)
            print(f"{'memory of the server, MiB':>32}  {low:.0f} to {high:.0f}, grown by {self.grown():+.2%}")
        for message in self.failed[:20]:
            print(f"FAILED: {message}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a checkpoint with a tokenizer")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--kill-engine", action="store_true", help="kill the engine at half time, start another server")
    parser.add_argument("--plain", action="store_true", help="without quantization, to compare")
    parser.add_argument("--log", type=Path, default=Path("load-server.log"), help="of the server")
    parser.add_argument("--out", type=Path, help="JSON of everything that was counted")
    arguments = parser.parse_args()
    exit_on_signals()
    report = load(
        arguments.model, arguments.clients, arguments.seconds, arguments.kill_engine, arguments.log, arguments.plain
    )
    if report.grown() > ALLOWED_GROWTH:
        report.failed.append(f"memory grew by {report.grown():.1%}, more than {ALLOWED_GROWTH:.0%}")
    report.show()
    if arguments.out:
        arguments.out.write_text(json.dumps({**dataclasses.asdict(report), "grown": report.grown()}, indent=1))
    sys.exit(1 if report.failed else 0)


def load(model: Path, clients: int, seconds: float, kill_engine: bool, log: Path, plain: bool = False) -> Report:
    """Start a server, load it for some seconds, stop it; with kill_engine, two of them, half of the time each."""
    report, port = Report(), free_port()
    parts = 2 if kill_engine else 1
    for part in range(parts):
        last = part + 1 == parts
        report.memory = []  # of the last server: another begins anew
        with serve(model, port, log, plain) as server:
            crowd = Load(server, port, clients, report)
            asyncio.run(crowd.run(seconds / parts, kill=not last))
            stop(server, crowd.processes, report, killed=not last)
    return report


@contextlib.contextmanager
def serve(model: Path, port: int, log: Path, plain: bool) -> Iterator[subprocess.Popen[str]]:
    quantization = [] if plain else ["--quantization", "qwantize"]
    command = [str(BIN / "vllm"), "serve", str(model), *quantization, "--served-model-name", NAME]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(MAX_MODEL_LEN), "--enforce-eager"]
    command += ["--num-gpu-blocks-override", str(KV_BLOCKS), "--block-size", str(KV_BLOCK_TOKENS)]
    with (
        log.open("a") as file,
        process_group(
            command, env={**server_environment(), **ALLOCATOR}, stdout=file, stderr=subprocess.STDOUT
        ) as server,
    ):
        yield server


def stop(server: subprocess.Popen[str], processes: list[psutil.Process], report: Report, killed: bool) -> None:
    """A server whose engine was killed ends by itself, which vLLM 0.32.0 does with status 0; the other one by SIGTERM.
    Of the processes that it had none may stay."""
    if not killed:
        server.send_signal(signal.SIGTERM)
    try:
        status = server.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        report.failed.append(f"the server still ran {PATIENCE:.0f} s after its {'engine' if killed else 'end'}")
        return
    if status != 0 and not killed:
        report.failed.append(f"the server ended with status {status}")
    left = psutil.wait_procs(processes, timeout=20)[1]
    report.failed += [f"a process was left over: {process}" for process in left]


class Load:
    """Clients of one server, from its start on until time is up."""

    def __init__(self, server: subprocess.Popen[str], port: int, clients: int, report: Report) -> None:
        self.server, self.clients, self.report = server, clients, report
        self.url = f"http://127.0.0.1:{port}"
        self.over = False  # no new requests
        self.killed = False  # requests may fail from now on
        self.numbers = iter(range(sys.maxsize))
        self.processes: list[psutil.Process] = []  # the server's children when the load was over

    async def run(self, seconds: float, kill: bool) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.clients)
        async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE, limits=limits, trust_env=False) as self.http:
            await self._until_healthy()
            await self._fill_cache()
            clients = [asyncio.create_task(self._client()) for _ in range(self.clients)]
            sampler = asyncio.create_task(self._sample_memory())
            await asyncio.sleep(seconds)
            self.processes = psutil.Process(self.server.pid).children(recursive=True)
            if kill:
                self._kill_engine()
            self.over = True
            await asyncio.gather(*clients)
            sampler.cancel()
            if not kill:
                await self._nothing_is_left()

    async def _until_healthy(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await self.http.get("/health")).status_code == 200:
                    return
            if self.server.poll() is not None or time.monotonic() > deadline:
                sys.exit("error: the server did not become healthy: see its log")
            await asyncio.sleep(0.5)

    async def _fill_cache(self) -> None:
        """Twice as many tokens as the KV cache has room for, no two requests alike."""
        length = MAX_MODEL_LEN - 8
        count = 2 * KV_BLOCKS * KV_BLOCK_TOKENS // length
        prompts = [random.Random(-i).choices(range(100, 200), k=length) for i in range(1, count)]
        bodies = [{"model": NAME, "prompt": prompt, "max_tokens": 1} for prompt in prompts]
        answers = await asyncio.gather(*(self.http.post("/v1/completions", json=body) for body in bodies))
        self.report.failed += [f"filling the cache: {each.text[:300]}" for each in answers if each.status_code != 200]

    async def _client(self) -> None:
        """One request after the other: of 16 one is malformed, of the others a third is left before its end."""
        while not self.over:
            number = next(self.numbers)
            try:
                if number % 16 == 5:
                    await self._malformed(number)
                else:
                    await self._stream(number, leaves=number % 3 == 0)
            except httpx.HTTPError as error:
                self._lost(f"request {number}: {type(error).__name__}: {error}")

    async def _stream(self, number: int, leaves: bool) -> None:
        choice = random.Random(number)
        content = f"{number}: {' '.join(choice.choices(WORDS, k=choice.randrange(4, 100)))}"
        body: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": content}], "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": choice.randrange(8, 64)}
        began, chunks, end, tokens = time.monotonic(), 0, "", 0
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                self._lost(f"request {number}: status {answer.status_code}: {(await answer.aread())[:300]!r}")
                return
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    chunks, end = chunks + 1, line.removeprefix("data: ")
                    if '"usage":{' in end:
                        tokens = json.loads(end)["usage"]["completion_tokens"]
                if leaves and chunks == 4:
                    self.report.count("left midway")
                    return
        if end != "[DONE]" or tokens != body["max_tokens"]:
            self._lost(f"request {number}: its stream ended after {tokens} of {body['max_tokens']} tokens with {end!r}")
            return
        self.report.tokens += tokens
        self.report.count("answered to the end")
        self.report.seconds.append(time.monotonic() - began)

    async def _malformed(self, number: int) -> None:
        good: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]}
        bad: list[Any] = [
            b"{not json",
            {},
            {**good, "model": "another"},
            {**good, "messages": "Hi"},
            {**good, "max_tokens": -1},
            {**good, "temperature": "hot"},
            {**good, "messages": [{"role": "user", "content": "long " * MAX_MODEL_LEN}]},
            {**good, "structured_outputs": {"regex": "["}},
            {**good, "n": 0},
        ]
        body = bad[number // 16 % len(bad)]
        given = {"content": body, "headers": {"Content-Type": "application/json"}} if body == bad[0] else {"json": body}
        answer = await self.http.post("/v1/chat/completions", **given)
        if 400 <= answer.status_code < 500:
            self.report.count("malformed and refused")
        else:
            self._lost(f"malformed request {body!r}: status {answer.status_code}: {answer.text[:300]!r}")

    def _lost(self, message: str) -> None:
        if self.killed:
            self.report.count("lost with the engine")
        else:
            self.report.count("failed")
            self.report.failed.append(message)

    async def _sample_memory(self) -> None:
        while True:
            processes = [psutil.Process(self.server.pid), *psutil.Process(self.server.pid).children(recursive=True)]
            used = 0
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    used += process.memory_full_info().uss
            self.report.memory.append(used / 2**20)
            await asyncio.sleep(SAMPLE_SECONDS)

    def _kill_engine(self) -> None:
        (engine,) = [process for process in self.processes if "EngineCore" in " ".join(process.cmdline())]
        self.killed = True
        self.report.count("engines killed")
        engine.kill()

    async def _nothing_is_left(self) -> None:
        """Requests whose clients have gone must go too."""
        for _ in range(30):
            metrics = (await self.http.get("/metrics")).text.splitlines()
            names = ("vllm:num_requests_running", "vllm:num_requests_waiting{", "vllm:kv_cache_usage_perc")
            left = {line for line in metrics if line.startswith(names) and float(line.split()[-1]) > 0}
            if not left:
                return
            await asyncio.sleep(1)
        self.report.failed.append(f"30 s after the last request the server still has some: {left}")


if __name__ == "__main__":
    main()
