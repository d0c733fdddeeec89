"""Quantizing a checkpoint file by file: bytes, memory, resuming, damaged input."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_cases import weight

from lowmem.integrations import _stream, from_bitsandbytes, quantize_checkpoint, read_checkpoint
from lowmem.quant import QTensor, QuantSpec, dequantize, quantize

safetensors_torch = pytest.importorskip("safetensors.torch")
INDEX = "model.safetensors.index.json"

NAMES = {
    "model.embed_tokens.weight": (40, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.mlp.experts.weight": (3, 32, 64),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.1.mlp.up_proj.weight": (96, 64),
    "model.layers.1.mlp.up_proj.bias": (96,),
    "lm_head.weight": (40, 64),
}
QUANTIZED = [n for n in NAMES if "proj.weight" in n or "experts" in n]


def tensors():
    return {n: weight(*s, draw=i).bfloat16() for i, (n, s) in enumerate(NAMES.items())}


@pytest.fixture
def source(tmp_path):
    """A checkpoint in two files, as transformers writes it."""
    folder = tmp_path / "source"
    folder.mkdir()
    items = list(tensors().items())
    shards = {"model-00001-of-00002.safetensors": dict(items[:4]), "model-00002-of-00002.safetensors": dict(items[4:])}
    for file, part in shards.items():
        safetensors_torch.save_file(part, folder / file, metadata={"format": "pt"})
    where = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


SPECS = {
    "nf4-nested": QuantSpec("nf4", 64, double_quant=True),
    "nf3": QuantSpec("nf3"),
    "int4-zero": QuantSpec("int4", 32, zero_point=True),
    "int2-row": QuantSpec("int2", -1),
    "nf2-scales3": QuantSpec("nf2", 16, double_quant=True, scale_bits=3, scale_group=16),
}


@pytest.mark.parametrize("name", SPECS)
def test_what_is_written_is_what_quantize_makes(name, source, tmp_path):
    spec, out = SPECS[name], tmp_path / "out"
    seen = []
    sizes = quantize_checkpoint(source, out, spec, progress=seen.append)
    assert sorted(seen) == sorted(NAMES)
    found, dense = dict(read_checkpoint(out)), tensors()
    assert found.keys() == dense.keys()
    for key, value in found.items():
        if key not in QUANTIZED:
            assert torch.equal(value, dense[key]) and value.dtype == torch.bfloat16
            continue
        made = quantize(dense[key], spec)
        assert isinstance(value, QTensor) and value.spec.code == made.spec.code and value.shape == made.shape
        assert value.dtype == torch.bfloat16 and torch.equal(dequantize(value), dequantize(made))
        assert value.nbytes == spec.storage_bytes(value.rows, value.cols)
    # bytes on the disk: the formula, and a header
    kept = sum(t.nbytes for n, t in dense.items() if n not in QUANTIZED)
    assert sizes["after"] == kept + sum(found[n].nbytes for n in QUANTIZED)
    assert sizes["before"] == sum(t.nbytes for t in dense.values())
    files = sorted(out.glob("*.safetensors"))
    stored = {k: v for f in files for k, v in safetensors_torch.load_file(f).items()}  # safetensors reads it too
    assert sum(t.nbytes for t in stored.values()) == sizes["after"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored.keys() and index["metadata"]["total_size"] == sizes["after"]
    assert (out / "tokenizer.json").read_text() == "{}" and not list(out.glob(".*"))


def test_loads_into_a_model(source, tmp_path):
    from lowmem.nn import QuantLinear

    quantize_checkpoint(source, tmp_path / "out", "nf4")
    stored = safetensors_torch.load_file(tmp_path / "out" / "model-00002-of-00002.safetensors")
    prefix = "model.layers.1.mlp.up_proj."
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 96, dtype=torch.bfloat16), "nf4")
    layer.load_state_dict({k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)})
    w = tensors()[prefix + "weight"]
    assert torch.equal(dequantize(layer.base), dequantize(quantize(w, "nf4")))


def test_bitsandbytes_layout(source, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(source, out, SPECS["nf4-nested"], layout="bitsandbytes")
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama" and config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert config["quantization_config"]["bnb_4bit_use_double_quant"] is True
    stored = {k: v for f in out.glob("*.safetensors") for k, v in safetensors_torch.load_file(f).items()}
    for name in QUANTIZED:
        made = quantize(tensors()[name], SPECS["nf4-nested"])
        assert torch.equal(dequantize(from_bitsandbytes(stored, name=name)), dequantize(made))
    found = dict(read_checkpoint(out))
    assert found.keys() == NAMES.keys() and all(isinstance(found[n], QTensor) for n in QUANTIZED)
    with pytest.raises(ValueError, match=r"lowmem\.to_bitsandbytes: q: expected nf4 or fp4, got nf3"):
        quantize_checkpoint(source, tmp_path / "other", "nf3", layout="bitsandbytes")
    assert not (tmp_path / "other").exists()


def test_a_spec_for_each_layer(source, tmp_path):
    given = {"model.layers.1.mlp.up_proj": "nf2", "model.layers.0.self_attn.q_proj.weight": SPECS["nf3"]}
    quantize_checkpoint(source, tmp_path / "out", given)
    found = dict(read_checkpoint(tmp_path / "out"))
    assert {n: v.spec.format for n, v in found.items() if isinstance(v, QTensor)} == {
        "model.layers.1.mlp.up_proj.weight": "nf2",
        "model.layers.0.self_attn.q_proj.weight": "nf3",
    }
    with pytest.raises(ValueError, match=r"spec: expected names of weights or layers of the checkpoint, got 'nowhere'"):
        quantize_checkpoint(source, tmp_path / "other", {"nowhere": "nf4"})


def test_resumes_and_leaves_nothing_half_written(source, tmp_path, monkeypatch):
    out = tmp_path / "out"

    class Stop(Exception):
        pass

    def stop(name):
        if "layers.1" in name:
            raise Stop

    with pytest.raises(Stop):
        quantize_checkpoint(source, out, "nf4", progress=stop)
    assert [p.name for p in out.iterdir()] == ["model-00001-of-00002.safetensors"]  # whole, and no temporary file
    before = (out / "model-00001-of-00002.safetensors").stat().st_mtime_ns
    seen = []
    quantize_checkpoint(source, out, "nf4", progress=seen.append)
    assert (
        sorted(seen) == sorted(list(NAMES)[4:])
        and (out / "model-00001-of-00002.safetensors").stat().st_mtime_ns == before
    )
    whole = tmp_path / "whole"
    quantize_checkpoint(source, whole, "nf4")
    for path in whole.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    with pytest.raises(ValueError, match=r"target: expected no file .* of these settings, got another one"):
        quantize_checkpoint(source, out, "nf3")


MEASURE = """
import sys, torch
from lowmem.integrations import quantize_checkpoint
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
torch.set_num_threads(1)
quantize_checkpoint(sys.argv[1], sys.argv[2], "nf4")  # the first tensor alone: what quantizing one takes
one = peak()
quantize_checkpoint(sys.argv[3], sys.argv[4], "nf4")
print(one, peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_one_tensor_at_a_time(tmp_path):
    size = 2 << 20  # elements of each of the sixteen tensors: 8 MiB in fp32
    for folder, count in (("one", 1), ("many", 16)):
        (tmp_path / folder).mkdir()
        part = {f"l{i}.weight": torch.full((1024, size // 1024), 0.5 + i) for i in range(count)}
        safetensors_torch.save_file(part, tmp_path / folder / "model.safetensors")
    folders = [str(tmp_path / f) for f in ("one", "one-out", "many", "many-out")]
    # freed blocks go back to the system: what is measured is what is held, not the allocator's gaps
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, "-c", MEASURE, *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    one, many = (1024 * int(v) for v in done.stdout.split())
    # sixteen tensors take no more than one did; two of them, or their sixteen packed forms, would show
    assert many - one < 4 * size, f"{(many - one) / 2**20:.1f} MiB more for 128 MiB of weights"


# ------------------------------------------------------------------------------------------------------------- damaged


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f), "source: expected a folder with a safetensors checkpoint"),
        (lambda f: [p.unlink() for p in f.iterdir()], "source: expected model.safetensors.index.json or"),
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "source: expected the file"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "source: expected .* with a weight_map"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'),
            "source: expected",
        ),
    ],
)
def test_bad_folders(spoil, message, source, tmp_path):
    spoil(source)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"lowmem\.quantize_checkpoint: {message}"):
        quantize_checkpoint(source, tmp_path / "out", "nf4")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": QuantSpec("int4", 128)}, "spec: expected a group size that divides K = 64"),
        ({"spec": {"model.layers.0.input_layernorm": "nf4"}}, "spec: expected floating weights of two or three"),
        ({"spec": "nf5"}, "format: expected one of"),
        ({"skip": "."}, "spec: expected weights to quantize, got none"),
        ({"method": "hqq"}, "method: expected 'absmax' or 'mse'"),
        ({"layout": "gguf"}, "layout: expected 'lowmem' or 'bitsandbytes'"),
    ],
)
def test_bad_arguments(change, message, source, tmp_path):
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(source, tmp_path / "out", **{"spec": "nf4", **change})
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="target: expected another folder"):
        quantize_checkpoint(source, source, "nf4")


def test_weights_that_are_not_finite(source, tmp_path):
    bad = tensors()["model.layers.1.mlp.up_proj.weight"]
    bad[3, 4] = float("nan")
    file = source / "model-00002-of-00002.safetensors"
    safetensors_torch.save_file({**safetensors_torch.load_file(file), "model.layers.1.mlp.up_proj.weight": bad}, file)
    with pytest.raises(ValueError, match=r"a weight 'model\.layers\.1\.mlp\.up_proj\.weight' .*NaN or infinity"):
        quantize_checkpoint(source, tmp_path / "out", "nf4")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model-00001-of-00002.safetensors"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    (folder / "a").mkdir()
    part = {"a.weight": weight(16, 64), "b.weight": weight(2, 8, 64), "c": torch.arange(5)}
    safetensors_torch.save_file(part, folder / "a" / "model.safetensors")
    quantize_checkpoint(folder / "a", folder / "b", SPECS["nf2-scales3"])
    return (folder / "b" / "model.safetensors").read_bytes()


@given(st.integers(0, 10**6), st.sampled_from(["cut", "bytes", "header", "longer"]))
def test_damaged_files(written, tmp_path_factory, draw, how):
    """A clear error, or tensors that lie within the file."""
    g = torch.Generator().manual_seed(draw)
    data = bytearray(written)
    head = 8 + int.from_bytes(data[:8], "little")

    def random(limit):
        return int(torch.randint(0, limit, (1,), generator=g))

    if how == "cut":
        data = data[: random(len(data))]
    elif how == "longer":
        data[:8] = (random(2**40) + 1).to_bytes(8, "little")
    else:
        for _ in range(1 + random(6)):
            data[random(head if how == "header" else len(data))] = random(256)
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "model.safetensors").write_bytes(data)
    try:
        for _, value in read_checkpoint(folder):
            if isinstance(value, QTensor):
                assert dequantize(value.check("test")).shape == value.shape
    except (ValueError, TypeError) as error:
        assert str(error).startswith("lowmem."), error
        return
    assert how != "cut"
    shutil.rmtree(folder)


def test_own_reader_and_writer_agree_with_safetensors(tmp_path):
    parts = {
        "a": torch.randn(3, 4), "b": torch.arange(7), "c": torch.zeros(0, 5), "d": torch.tensor(True),
        "e": torch.randn(5).bfloat16(), "f": torch.randn(2, 2).to(torch.float8_e4m3fn),
    }  # fmt: skip
    safetensors_torch.save_file(parts, tmp_path / "x.safetensors", metadata={"k": "v"})
    entries, metadata = _stream.read_header("test", tmp_path / "x.safetensors")
    assert metadata == {"k": "v"} and entries.keys() == parts.keys()
    with open(tmp_path / "y.safetensors", "wb") as file:
        planned = {n: _stream.Entry(t.dtype, tuple(t.shape)) for n, t in parts.items()}
        file.write(_stream.header_bytes(planned, metadata))
        _stream.write_tensors(file, list(planned.items()), parts)
    again = safetensors_torch.load_file(tmp_path / "y.safetensors")
    for name, value in parts.items():
        for found in (_stream.read_tensor(tmp_path / "x.safetensors", entries[name]), again[name]):
            assert found.dtype == value.dtype and found.shape == value.shape
            assert torch.equal(found.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name
