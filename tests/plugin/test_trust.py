"""A checkpoint's own settings reach its own files only; the user's reach any file."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from qwantize_vllm.plugin.trust import with_trusted_paths


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret.safetensors"
    file.touch()
    return file


@pytest.fixture
def checkpoint(tmp_path: Path, secret: Path) -> Path:
    """With a file of its own, a link to that, and links that lead out."""
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "own.safetensors").touch()
    (folder / "link.safetensors").symlink_to("sub/own.safetensors")
    (folder / "out.safetensors").symlink_to(secret)
    (folder / "up").symlink_to(tmp_path)
    return folder


def trusted(hessian: Any, model: Path | str, overrides: Any = None, **load: Any) -> Any:
    """What becomes of a setting that came as if from config.json."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(model), hf_config_path=None, revision=None, hf_overrides={} if overrides is None else overrides
        ),
        load_config=SimpleNamespace(download_dir=None, **load),
    )
    return with_trusted_paths({"scale_search": "hessian", "hessian": hessian}, config)["hessian"]


@pytest.mark.parametrize("own", ["sub/own.safetensors", "./sub/own.safetensors", "link.safetensors"])
def test_a_checkpoint_names_its_own_files(checkpoint, own):
    assert trusted(own, checkpoint) == str(checkpoint / "sub" / "own.safetensors")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{secret}", "relative to its directory"),
        ("../secret.safetensors", "relative to its directory"),
        ("sub/../../secret.safetensors", "relative to its directory"),
        ("out.safetensors", "a link that leads out"),
        ("up/secret.safetensors", "a link that leads out"),
        ("missing.safetensors", "no such file"),
        ("sub", "no such file"),
        ("", "no such file"),
        ("~/secret.safetensors", "no such file"),
        ("http://127.0.0.1/secret.safetensors", "no such file"),
        ("own\0.safetensors", "relative to its directory"),
        (["sub/own.safetensors"], "relative to its directory"),
    ],
)
def test_a_checkpoint_names_no_other_file(checkpoint, secret, path, message):
    if isinstance(path, str):
        path = path.format(secret=secret)
    with pytest.raises(ValueError, match=f"{re.escape(repr(path))} in the checkpoint's own config.*{message}"):
        trusted(path, checkpoint)


def test_a_model_that_is_not_on_this_machine_names_none():
    with pytest.raises(ValueError, match="never downloaded"):
        trusted("own.safetensors", "somebody/something")


@pytest.mark.parametrize(
    "overrides",
    [
        {"quantization_config": {"hessian": "/any/file"}},
        {"text_config": {"quantization_config": {"hessian": "/any/file"}}},
    ],
    ids=["of the model", "of its text part"],
)
def test_the_user_names_any_file(checkpoint, overrides):
    assert trusted("/any/file", checkpoint, overrides) == "/any/file"


@pytest.mark.parametrize(
    "overrides",
    [
        {"quantization_config": {"hessian": "/another/file"}},  # as of a draft model, whose settings these would be
        {"rope_scaling": {"hessian": "/any/file"}},
        {"text_config": None},
        lambda config: config,
    ],
    ids=["another file", "another key", "nothing", "function"],
)
def test_other_overrides_do_not_make_a_path_the_users(checkpoint, overrides):
    with pytest.raises(ValueError, match="the checkpoint's own config"):
        trusted("/any/file", checkpoint, overrides)


def test_a_snapshot_in_the_hubs_cache_consists_of_links_to_its_blobs(tmp_path, secret):
    repository = tmp_path / "models--somebody--something"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "blobs" / "abc").touch()
    (snapshot / "own.safetensors").symlink_to("../../blobs/abc")
    (snapshot / "out.safetensors").symlink_to(secret)
    assert trusted("own.safetensors", snapshot) == str(repository / "blobs" / "abc")
    with pytest.raises(ValueError, match="a link that leads out"):
        trusted("out.safetensors", snapshot)


def test_a_model_named_as_on_the_hub_is_looked_up_in_its_cache(tmp_path, monkeypatch):
    repository = tmp_path / "models--somebody--something"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    (snapshot / "config.json").touch()
    (snapshot / "own.safetensors").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert trusted("own.safetensors", "somebody/something") == str(snapshot / "own.safetensors")
