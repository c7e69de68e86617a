"""scripts/random_checkpoint.py, and what load_time.py and reload_time.py take for a checkpoint. No engine is started:
those that are, see e2e/test_timing_scripts.py."""

from __future__ import annotations

from pathlib import Path

import load_time
import pytest
import random_checkpoint
import reload_time
import safetensors.torch
from random_checkpoint import is_written, llama_config, write_checkpoint
from typer.testing import CliRunner

CONFIG = llama_config("tiny", 1)


@pytest.fixture(autouse=True)
def _few_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_checkpoint, "_DRAWN", 2**16)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def break_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the second file of weights fail."""
    save = safetensors.torch.save_file

    def save_one(tensors, file, **options):
        if "00002" in file.name:
            raise OSError("no space left")
        save(tensors, file, **options)

    monkeypatch.setattr(random_checkpoint, "_SHARD_BYTES", 2**16)
    monkeypatch.setattr(random_checkpoint, "save_file", save_one)


def test_what_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "checkpoint"
    with monkeypatch.context() as broken:
        break_off(broken)
        with pytest.raises(OSError, match="no space left"):
            write_checkpoint(path, CONFIG)
    assert not is_written(path, CONFIG)
    assert list(path.parent.iterdir()) == []


def test_what_was_killed_is_written_anew(tmp_path):
    path = tmp_path / "checkpoint"
    unfinished = path.with_name("checkpoint.unfinished")
    unfinished.mkdir()
    (unfinished / "model-00002.safetensors").touch()
    assert not is_written(path, CONFIG)
    write_checkpoint(path, CONFIG)
    assert is_written(path, CONFIG)
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint"]
    assert "model-00002.safetensors" not in contents(path)


def test_what_is_there_is_not_written_over(tmp_path):
    write_checkpoint(tmp_path / "checkpoint", CONFIG)
    before = contents(tmp_path / "checkpoint")
    with pytest.raises(FileExistsError, match="is there already"):
        write_checkpoint(tmp_path / "checkpoint", CONFIG, seed=1)
    assert contents(tmp_path / "checkpoint") == before


def half(path: Path) -> None:
    (path / "model.safetensors.index.json").unlink()


def without_weights(path: Path) -> None:
    (path / "model-00001.safetensors").unlink()


def other_model(path: Path) -> None:
    (path / "config.json").write_text("{}")


def no_json(path: Path) -> None:
    (path / "config.json").write_text("{")


@pytest.mark.parametrize("spoil", [half, without_weights, other_model, no_json])
def test_another_folder_of_that_name_is_refused(tmp_path, spoil):
    path = tmp_path / "checkpoint"
    write_checkpoint(path, CONFIG)
    spoil(path)
    with pytest.raises(FileExistsError, match="no checkpoint of the model asked for: remove it"):
        is_written(path, CONFIG)


def test_reload_time_takes_only_the_model_asked_for(tmp_path):
    works = [
        reload_time.Work(tmp_path, {"small": llama_config("tiny", layers)}, repetitions=1, reloads=6, options={})
        for layers in (1, 2)
    ]
    path = works[0].checkpoint("small", 0)
    before = contents(path)
    assert works[0].checkpoint("small", 0) == path
    with pytest.raises(FileExistsError, match="remove it"):
        works[1].checkpoint("small", 0)
    assert contents(path) == before


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The checkpoints that load_time.py would start, all of which fail."""
    checkpoints: list[Path] = []

    def fail(method, number, first, checkpoint, work, options):
        assert (checkpoint / "config.json").exists()
        checkpoints.append(checkpoint)

    monkeypatch.setattr(load_time, "_try", fail)
    return checkpoints


def time_load(folder: Path, *options: str) -> tuple[int, str]:
    """Exit code, and what is printed, in one line."""
    arguments = ["--shape", "tiny", "--layers", "1", "--starts", "1", "--folder", str(folder), *options]
    outcome = CliRunner().invoke(load_time.app, arguments)
    return outcome.exit_code, " ".join(outcome.output.replace("│", " ").split())


def test_load_time_removes_what_it_has_written(tmp_path, started):
    assert time_load(tmp_path)[0] == 1
    assert len(started) == 4  # each method with one layer, then with all
    assert not list(tmp_path.iterdir())


def test_load_time_starts_there_and_back(tmp_path, monkeypatch):
    starts = []
    monkeypatch.setattr(load_time, "_try", lambda method, number, *rest: starts.append((number, method)))
    time_load(tmp_path, "--starts", "2")
    measured = [(1, "qwantize"), (1, "bf16"), (2, "bf16"), (2, "qwantize")]
    assert starts == [(0, "qwantize"), (0, "bf16"), *measured]
    starts.clear()
    time_load(tmp_path, "--starts", "2", "--skip-one-layer")
    assert starts == measured


def test_load_time_keeps_what_it_is_to_keep_and_uses_it(tmp_path, started):
    assert time_load(tmp_path, "--keep")[0] == 1
    (path,) = tmp_path.iterdir()
    before = contents(path)
    assert "is there" in time_load(tmp_path, "--keep")[1]
    assert started[-1] == path
    assert contents(path) == before


def test_load_time_refuses_a_checkpoint_that_it_would_remove(tmp_path, started):
    time_load(tmp_path, "--keep")
    (path,) = tmp_path.iterdir()
    before = contents(path)
    started.clear()
    exit_code, printed = time_load(tmp_path)
    assert exit_code == 2
    assert "is there: use it with --keep, or remove it" in printed
    assert not started
    assert contents(path) == before


@pytest.mark.parametrize("options", [[], ["--keep"]])
def test_load_time_refuses_a_half_checkpoint(tmp_path, started, options):
    time_load(tmp_path, "--keep")
    (path,) = tmp_path.iterdir()
    half(path)
    started.clear()
    exit_code, printed = time_load(tmp_path, *options)
    assert exit_code == 2
    assert "no checkpoint of the model asked for" in printed
    assert not started
    assert path.exists()
