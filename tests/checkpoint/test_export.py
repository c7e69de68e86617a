"""An export that is ended anywhere: a second run makes of it what an uninterrupted one makes."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwantize_vllm import quantize_nvfp4
from qwantize_vllm.checkpoint import LAYOUTS, Checkpoint
from qwantize_vllm.checkpoint.export import NOTES, ExportJob, ExportLayer, export, verify
from qwantize_vllm.checkpoint.members import Member, Part

LAYERS = 6
KILLS = 20
EXPERTS, INNER = 3, 32


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two files with the members of every fused layer in different ones, and what else a checkpoint has."""
    folder = tmp_path_factory.mktemp("export") / "source"
    (folder / "1_Pooling").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    files: list[dict[str, torch.Tensor]] = [{"embed.weight": torch.randn(10, 32, generator=generator)}, {}]
    for i in range(LAYERS):
        for j, name in enumerate(("q", "k", "o")):
            files[j % 2][f"l{i}.{name}.weight"] = torch.randn(8 + 8 * j, 32, generator=generator).bfloat16() * (1 + j)
        files[0][f"l{i}.norm.weight"] = torch.ones(32)
    files[0]["m.experts.gate_up"] = torch.randn(EXPERTS, 32, 2 * INNER, generator=generator).bfloat16()
    files[1]["m.experts.down"] = torch.randn(EXPERTS, 32, INNER, generator=generator).bfloat16()
    for number, tensors in enumerate(files):
        save_file(tensors, folder / f"{number}.safetensors")
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"a": "ä"}')
    (folder / "pytorch_model.bin").write_bytes(b"never copied")
    return folder


def job_for(source: Path, out: Path, **change: Any) -> ExportJob:
    whole = Member.whole
    layers = [ExportLayer(f"l{i}.qk", (whole(f"l{i}.q.weight"), whole(f"l{i}.k.weight"))) for i in range(LAYERS)]
    layers += [ExportLayer(f"l{i}.o", (whole(f"l{i}.o.weight"),)) for i in range(LAYERS)]
    for expert in range(EXPERTS):
        at = f"m.experts.{expert}"
        gate, up = (Part(expert, start, INNER, True) for start in (0, INNER))
        gate_up = [Member(f"{at}.{name}", "m.experts.gate_up", part) for name, part in (("gate", gate), ("up", up))]
        down = Member(f"{at}.down", "m.experts.down", Part(expert, 0, 32, False))
        layers += [ExportLayer(f"{at}.w13", tuple(gate_up)), ExportLayer(f"{at}.w2", (down,))]
    job = ExportJob(
        source=Checkpoint(source),
        out=out,
        layout=LAYOUTS["compressed-tensors"],
        layers=layers,
        dtype=torch.bfloat16,
        block_size=16,
        ignore=["lm_head", "embed"],
        settings={"scale_search": "optimal"},
        shard_bytes=2000,
    )
    return dataclasses.replace(job, **change)


def quantize(layer: ExportLayer, weight: torch.Tensor) -> list[Any]:
    return [quantize_nvfp4(weight, scale_search="naive")]


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """An export that nothing interrupted."""
    out = tmp_path_factory.mktemp("export") / "whole"
    export(job_for(source, out), quantize)
    return out


def test_what_is_written(source, whole):
    checkpoint = Checkpoint(whole)
    assert len(checkpoint.files) > 3
    dense = load_file(source / "0.safetensors") | load_file(source / "1.safetensors")
    layout = LAYOUTS["compressed-tensors"]
    for i in range(LAYERS):
        rows = torch.cat([dense[f"l{i}.q.weight"], dense[f"l{i}.k.weight"]])
        members = [
            layout.read(
                f"l{i}.{each}", {name: checkpoint.read(name) for name in layout.described(f"l{i}.{each}", 1, 16, 16)}
            )
            for each in ("q", "k")
        ]
        assert members[0].global_scale == members[1].global_scale
        assert torch.equal(torch.cat([q.dequantize() for q in members]), quantize_nvfp4(rows, "naive").dequantize())
        assert torch.equal(checkpoint.read(f"l{i}.norm.weight"), dense[f"l{i}.norm.weight"])
    assert torch.equal(checkpoint.read("embed.weight"), dense["embed.weight"])
    config = json.loads((whole / "config.json").read_text())
    assert config["model_type"] == "tiny"
    assert config["quantization_config"]["ignore"] == ["lm_head", "embed"]
    others = {name for name in files_of(whole) if not name.endswith(".safetensors")}
    index = "model.safetensors.index.json"
    assert others == {"config.json", "tokenizer.json", "1_Pooling/config.json", index, NOTES}
    assert verify(whole) == len(checkpoint.tensors)


def test_stacked_experts_are_written_one_by_one(source, whole):
    checkpoint, layout = Checkpoint(whole), LAYOUTS["compressed-tensors"]
    dense = load_file(source / "0.safetensors") | load_file(source / "1.safetensors")
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    assert not dense.keys() & {name for name in tensors if name.startswith("m.")}
    for expert in range(EXPERTS):
        at = f"m.experts.{expert}"
        gate, up, down = (layout.read(f"{at}.{name}", tensors) for name in ("gate", "up", "down"))
        both = quantize_nvfp4(dense["m.experts.gate_up"][expert].T.contiguous(), "naive")
        assert torch.equal(torch.cat([gate.codes, up.codes]), both.codes)
        assert torch.equal(torch.cat([gate.dequantize(), up.dequantize()]), both.dequantize())
        alone = quantize_nvfp4(dense["m.experts.down"][expert], "naive")
        assert torch.equal(down.codes, alone.codes)
        assert torch.equal(down.dequantize(), alone.dequantize())
    files = {checkpoint.tensors[f"m.experts.{expert}.gate.weight_packed"].file for expert in range(EXPERTS)}
    assert len(files) == EXPERTS  # so that an interrupted export goes on between them


def test_an_export_that_wants_other_layers_does_not_go_on(source, tmp_path):
    """As those that another version left, which wrote stacked experts as they are."""
    interrupted(source, tmp_path / "out")
    layers = [layer for layer in job_for(source, tmp_path / "out").layers if "experts" not in layer.name]
    with pytest.raises(ValueError, match="left of another export, with other layers; remove it"):
        export(job_for(source, tmp_path / "out", layers=layers), quantize)


def test_a_directory_that_is_there_is_not_touched(source, whole):
    before = files_of(whole)
    with pytest.raises(ValueError, match="exists and is not an empty directory"):
        export(job_for(source, whole), quantize)
    assert files_of(whole) == before


def in_child(source: Path, out: Path, last: int | None) -> int:
    """Export in a forked process, which kills itself before its file operation number `last`; how many there were."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        done = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal done
            if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(out) in str(arguments[0]):
                if done == last:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1

        sys.addaudithook(count)
        try:
            export(job_for(source, out), quantize)
        finally:
            os.write(writer, str(done).encode())
            os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        said = file.read()
    assert os.WIFSIGNALED(status) == (last is not None)
    return int(said or 0)


def test_killed_anywhere_a_second_run_finishes_it(source, whole, tmp_path):
    """Twenty exports, each killed twice, before file operations drawn at random: opening, renaming, removing."""
    expected, chance = files_of(whole), random.Random(0)
    operations = in_child(source, tmp_path / "counted", None)
    assert files_of(tmp_path / "counted") == expected
    assert operations > 50
    for number in range(KILLS):
        out = tmp_path / str(number)
        for _ in range(2):
            in_child(source, out, chance.randrange(operations // 2))
            assert not out.exists()
            # Without config.json vLLM takes it for nothing; with it, everything else is there.
            partial = files_of(tmp_path / f"{number}.partial")
            assert "config.json" not in partial or expected.items() <= partial.items()
        export(job_for(source, out), quantize)
        assert files_of(out) == expected
        assert not (tmp_path / f"{number}.partial").exists()


def test_killed_before_the_last_operations(source, whole, tmp_path):
    expected = files_of(whole)
    operations = in_child(source, tmp_path / "counted", None)
    for before_end in range(1, 9):
        out = tmp_path / str(before_end)
        in_child(source, out, operations - before_end)
        assert not out.exists()
        export(job_for(source, out), quantize)
        assert files_of(out) == expected


def interrupted(source: Path, out: Path) -> Path:
    """What an export leaves that failed in its last layers."""

    def fail(layer: ExportLayer, weight: torch.Tensor) -> list[Any]:
        if layer.name == f"l{LAYERS - 1}.o":
            raise ValueError("stop")
        return quantize(layer, weight)

    with pytest.raises(ValueError, match="stop"):
        export(job_for(source, out), fail)
    return out.with_name(f"{out.name}.partial")


def test_finished_shards_are_not_quantized_again(source, whole, tmp_path):
    interrupted(source, tmp_path / "out")
    seen = []

    def watch(layer: ExportLayer, weight: torch.Tensor) -> list[Any]:
        seen.append(layer.name)
        return quantize(layer, weight)

    export(job_for(source, tmp_path / "out"), watch)
    assert 0 < len(seen) < len(job_for(source, tmp_path).layers)
    assert files_of(tmp_path / "out") == files_of(whole)


@pytest.mark.parametrize(
    "change", [{"settings": {"scale_search": "naive"}}, {"shard_bytes": 4000}, {"dtype": torch.half}]
)
def test_what_another_export_left_is_refused(source, tmp_path, change):
    partial = interrupted(source, tmp_path / "out")
    before = files_of(partial)
    with pytest.raises(ValueError, match=rf"left of another export, with other {next(iter(change))}; remove it"):
        export(job_for(source, tmp_path / "out", **change), quantize)
    assert files_of(partial) == before


def test_files_of_a_stranger_are_refused(source, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"has files .* but no qwantize-export\.json"):
        export(job_for(source, tmp_path / "out"), quantize)


def test_two_at_once(source, tmp_path):
    def second(layer: ExportLayer, weight: torch.Tensor) -> list[Any]:
        with pytest.raises(ValueError, match="another process is exporting to"):
            export(job_for(source, tmp_path / "out"), quantize)
        return quantize(layer, weight)

    export(job_for(source, tmp_path / "out"), second)
    assert verify(tmp_path / "out")


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_shard_damaged_before_the_second_run_is_written_again(source, whole, tmp_path, capsys):
    partial = interrupted(source, tmp_path / "out")
    shards = sorted(partial.glob("*.safetensors"))
    flip(shards[0], -1)
    shards[1].write_bytes(shards[1].read_bytes()[:-5])
    export(job_for(source, tmp_path / "out"), quantize)
    assert files_of(tmp_path / "out") == files_of(whole)
    said = capsys.readouterr().out
    assert f"{shards[0]}: the bytes of tensor" in said
    assert f"{shards[1]} cannot be read as safetensors" in said


def test_verify_names_the_file_and_the_tensor(source, tmp_path):
    out = tmp_path / "out"
    export(job_for(source, out), quantize)
    path = out / Checkpoint(out).tensors["l2.o.weight_packed"].file
    good = path.read_bytes()
    tensors = load_file(path)
    save_file({**tensors, "more": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{path.name} has tensor 'more', which was not written to it"):
        verify(out)
    tensors["l2.o.weight_packed"][3, 3] ^= 16
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{path.name}: the bytes of tensor 'l2.o.weight_packed' are not those"):
        verify(out)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name} is not there"):
        verify(out)
    path.write_bytes(good)
    verify(out)
    (out / NOTES).write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        verify(out)
    (out / NOTES).unlink()
    with pytest.raises(ValueError, match="`qwantize export` did not write it"):
        verify(out)


def test_a_source_that_breaks_off_is_named(source, tmp_path):
    job = job_for(source, tmp_path / "out")

    def cut(layer: ExportLayer, weight: torch.Tensor) -> list[Any]:
        job.source.tensors.update({"l5.o.weight": dataclasses.replace(job.source.tensors["l5.o.weight"], file="gone")})
        return quantize(layer, weight)

    with pytest.raises(ValueError, match=r"gone: tensor 'l5\.o\.weight' cannot be read"):
        export(job, cut)


def test_of_folders_only_what_belongs_to_the_model_is_copied(source, tmp_path):
    """Not what a trainer saved in between, nor the export itself."""
    model = shutil.copytree(source, tmp_path / "model")
    (model / "modules.json").write_text('[{"idx": 0, "path": ""}, {"idx": 2, "path": "2_Dense"}]')
    for folder in ("2_Dense", "checkpoint-500"):
        (model / folder).mkdir()
        (model / folder / "config.json").write_text("{}")
        save_file({"weight": torch.ones(2)}, model / folder / "model.safetensors")
    out = model / "nvfp4"
    export(job_for(model, out), quantize)
    copied = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.parent != out)
    assert copied == [
        *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
        "checkpoint-500/config.json",
    ]


def test_what_safetensors_left_unfinished_is_removed(source, whole, tmp_path):
    job = job_for(source, tmp_path / "out")
    job.partial.mkdir()
    (job.partial / ".tmpAbC").write_bytes(b"a gigabyte")
    export(job, quantize)
    assert {path.name for path in job.out.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_mounted_directory_cannot_be_renamed_to(source, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: True)
    with pytest.raises(ValueError, match="out is where a file system is mounted"):
        export(job_for(source, tmp_path / "out"), quantize)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_cannot_be_renamed_to(source, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"out is a link, .*choose what it leads to, .*elsewhere"):
        export(job_for(source, tmp_path / "out"), quantize)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]
