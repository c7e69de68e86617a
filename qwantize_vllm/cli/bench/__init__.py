"""`qwantize bench`: measurements that anyone can repeat."""

from __future__ import annotations

import typer

from qwantize_vllm.cli.bench.matmul.command import bench_matmul
from qwantize_vllm.cli.bench.moe import bench_moe
from qwantize_vllm.cli.bench.quantize import bench_quantize
from qwantize_vllm.cli.bench.serve import bench_serve

app = typer.Typer(no_args_is_help=True, help=__doc__)
app.command("serve")(bench_serve)
app.command("quantize")(bench_quantize)
app.command("matmul")(bench_matmul)
app.command("moe")(bench_moe)
