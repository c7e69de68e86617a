"""`qwantize ...`: the command line."""

from __future__ import annotations

import typer

from qwantize_vllm.cli.bench import app as bench_app
from qwantize_vllm.cli.calibrate import run_calibration
from qwantize_vllm.cli.env import show_environment
from qwantize_vllm.cli.eval import evaluate
from qwantize_vllm.cli.export import run_export, run_verify
from qwantize_vllm.cli.inspect.command import inspect

app = typer.Typer(no_args_is_help=True, pretty_exceptions_show_locals=False, help=__doc__)
app.command("env")(show_environment)
app.command("eval")(evaluate)
app.command("calibrate")(run_calibration)
app.command("inspect")(inspect)
app.command("export")(run_export)
app.command("verify")(run_verify)
app.add_typer(bench_app, name="bench")
