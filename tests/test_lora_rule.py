"""The rule between the fused and the composed GEMM. Every rate in this file is made up: none was measured anywhere."""

import json

import pytest
import torch

from lowmem import _dispatch
from lowmem.ops import lora_linear, lora_rule
from lowmem.ops.lora_rule import Rates, break_even, dy_way, fuses, masked_expand_way, measure, shape_class

SHAPE = (8192, 4096, 4096)
GPU = "A GPU that does not exist"
FAST, SLOW = Rates(7e14, 4e12, 0.97), Rates(7e14, 4e12, 0.94)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LOWMEM_AUTOTUNE", raising=False)
    monkeypatch.setattr(lora_rule, "_memory", {})
    return tmp_path


def test_break_even_is_where_both_ways_take_equally_long():
    f, bw, m, n, k = 7e14, 4e12, 8192, 4096, 4096
    for passes in (lora_rule.PREFILL_PASSES, lora_rule.UPDATE_PASSES):
        composed = 2 * m * n * k / f + passes * 2 * m * n / bw
        fused = 2 * m * n * k / (break_even(f, bw, k, passes) * f)
        assert fused == pytest.approx(composed, rel=1e-12)
    assert break_even(f, bw, k, 2) == pytest.approx(1 / (1 + 2 * f / (bw * k)))
    assert break_even(f, bw, 14336) > break_even(f, bw, 4096), "a deeper product leaves less to win"


def test_shape_classes():
    key = shape_class("expand", SHAPE, 16, torch.bfloat16)
    assert key == "expand/bfloat16/m8192/n4096/k4096/r16"
    assert shape_class("expand", (8000, 4500, 4096), 3, torch.bfloat16) == key
    assert shape_class("dx", (1, 1, 1), 17, torch.float16) == "dx/float16/m128/n128/k128/r32"
    assert shape_class("dx", (11585, 11586, 64), 512, torch.float16) == "dx/float16/m8192/n16384/k128/r512"


def test_nothing_measured_means_composed(monkeypatch):
    assert not lora_rule.MEASURED and not lora_rule.PREFERRED, "no GPU has been measured: update the README with it"

    def never():
        raise AssertionError("measured without LOWMEM_AUTOTUNE=1")

    assert not fuses("expand", GPU, SHAPE, 16, torch.bfloat16, never)
    monkeypatch.setenv("LOWMEM_AUTOTUNE", "1")
    assert not fuses("expand", GPU, SHAPE, 16, torch.bfloat16, None), "nothing can be measured during a capture"


def test_measured_rates_decide(monkeypatch):
    key = shape_class("expand", SHAPE, 16, torch.bfloat16)
    for rates, want in ((FAST, True), (SLOW, False)):
        monkeypatch.setattr(lora_rule, "MEASURED", {GPU: {key: rates}})
        assert fuses("expand", GPU, SHAPE, 16, torch.bfloat16) is want
        assert not fuses("dx", GPU, SHAPE, 16, torch.bfloat16), "another operator"
        assert not fuses("expand", "another", SHAPE, 16, torch.bfloat16)
    assert not fuses("expand", GPU, SHAPE, 16, torch.float32, lambda: FAST)


def test_autotune_measures_once_and_keeps_it(monkeypatch, elsewhere):
    monkeypatch.setenv("LOWMEM_AUTOTUNE", "1")
    calls = []

    def once():
        calls.append(1)
        return FAST

    for _ in range(3):
        assert fuses("expand", GPU, SHAPE, 16, torch.bfloat16, once)
    assert not fuses("dx", GPU, SHAPE, 16, torch.bfloat16, lambda: SLOW)
    monkeypatch.setattr(lora_rule, "_memory", {})  # another process
    assert fuses("expand", GPU, SHAPE, 16, torch.bfloat16, once) and len(calls) == 1
    stored = json.loads(lora_rule.cache_file().read_text())
    assert len(stored[GPU]) == 2
    assert [path.name for path in (elsewhere / "lowmem").iterdir()] == ["lora_rates.json"], "temporary files stay"
    monkeypatch.delenv("LOWMEM_AUTOTUNE")
    assert not fuses("expand", GPU, SHAPE, 16, torch.bfloat16, once), "kept rates count under LOWMEM_AUTOTUNE=1 only"


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"GPU": 3}', '{"GPU": {"CLASS": {"eta": "x"}}}'])
def test_a_damaged_cache_is_measured_again(monkeypatch, text):
    monkeypatch.setenv("LOWMEM_AUTOTUNE", "1")
    path = lora_rule.cache_file()
    path.parent.mkdir(parents=True)
    path.write_text(text.replace("GPU", GPU).replace("CLASS", shape_class("expand", SHAPE, 16, torch.bfloat16)))
    assert fuses("expand", GPU, SHAPE, 16, torch.bfloat16, lambda: FAST)
    assert json.loads(path.read_text())[GPU], "and written anew"


def test_a_folder_that_cannot_be_written(monkeypatch, elsewhere):
    monkeypatch.setenv("LOWMEM_AUTOTUNE", "1")
    (elsewhere / "lowmem").write_text("a file where the folder should be")
    calls = []
    for _ in range(2):
        assert fuses("expand", GPU, SHAPE, 16, torch.bfloat16, lambda: calls.append(1) or FAST)
    assert len(calls) == 1


def test_rates_come_from_medians_of_interleaved_rounds():
    order = []
    took = {"base": 2e-3, "fused": 2.5e-3, "copy": 1e-3}

    def named(name):
        return lambda: order.append(name) or name

    def seconds(call):
        name = call()
        return took[name] * (100 if order.count(name) == 3 else 1)  # one slow outlier each

    rates = measure(
        named("base"), named("fused"), named("copy"), flops=1e12, copied_bytes=4e9, seconds=seconds, rounds=5
    )
    assert rates == Rates(gemm=pytest.approx(5e14), copy=pytest.approx(4e12), eta=pytest.approx(0.8))
    assert order[:6] == ["base", "fused", "copy"] * 2


def test_the_other_ways(monkeypatch):
    half, full = torch.bfloat16, torch.float32
    assert [dy_way(GPU, r, half, cuda) for r in (1, 64, 65) for cuda in (False, True)] == [
        "triton", "triton", "triton", "triton", "torch", "torch",
    ]  # fmt: skip
    assert dy_way(GPU, 16, full, True) == "torch"
    assert [masked_expand_way(GPU, cuda) for cuda in (False, True)] == ["triton", "cuda"]
    monkeypatch.setattr(lora_rule, "PREFERRED", {GPU: {"lora_dy": "cuda", "lora_masked_expand_": "triton"}})
    assert dy_way(GPU, 100, half, True) == "cuda" and dy_way(GPU, 16, half, False) == "triton"
    assert masked_expand_way(GPU, True) == "triton"
    monkeypatch.setattr(lora_rule, "PREFERRED", {GPU: {"lora_dy": "torch", "lora_masked_expand_": "torch"}})
    assert dy_way(GPU, 16, half, True) == "torch" and masked_expand_way(GPU, True) == "torch"


# ------------------------------------------------------------------------------------------------------------- the CPU


def never():
    raise AssertionError("measured without LOWMEM_AUTOTUNE=1")


def test_cpu_ways_by_rank():
    half = torch.bfloat16
    for op in ("lora_dy", "lora_da"):
        ways = [lora_rule.cpu_way(op, (2048, 4096), r, half, never) for r in (1, 15, 16, 17, 64, 512)]
        assert ways == ["cpp"] * 3 + ["torch"] * 3
        assert lora_rule.cpu_way(op, (2048, 4096), 512, torch.float32, never) == "cpp"


def test_autotune_measures_the_cpus_ways(monkeypatch):
    monkeypatch.setenv("LOWMEM_AUTOTUNE", "1")
    took = {"cpp": 1.0, "torch": 2.0}
    monkeypatch.setattr(lora_rule, "cpu_seconds", lambda call: took.get(call(), 1e-9))
    made = []

    def ways():
        made.append(1)
        return lambda: "cpp", lambda: "torch"

    args = ("lora_dy", (2048, 4096), 64, torch.bfloat16, ways)
    assert lora_rule.cpu_way(*args) == "cpp" and lora_rule.cpu_way(*args) == "cpp" and len(made) == 1
    took["torch"] = 0.5
    assert lora_rule.cpu_way("lora_da", *args[1:]) == "torch"
    monkeypatch.setattr(lora_rule, "_memory", {})  # another process reads what this one kept
    assert lora_rule.cpu_way(*args) == "cpp" and len(made) == 2


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autotune", ["0", "1"])
def test_gradients_whichever_way(monkeypatch, autotune, adapter):
    """Ranks on both sides of the rule, by the family's error rule; fp32 adapters never take a rounded gradient."""
    import lora_cases

    monkeypatch.setenv("LOWMEM_AUTOTUNE", autotune)
    precision = "bf16" if adapter is torch.bfloat16 else "bf16+fp32"
    for r in (16, 64):
        for p in (0.0, 0.1):
            lora_cases.check_linear(lora_cases.Case(m=65, k=100, n=33, r=r, p=p, precision=precision))


@pytest.mark.skipif(not _dispatch.CPU.loaded, reason=_dispatch.CPU.why_not)
def test_the_rule_is_asked(monkeypatch):
    asked = []

    def way(op, shape, rank, dtype, ways):
        asked.append((op, shape, rank))
        return "torch"

    monkeypatch.setattr(lora_rule, "cpu_way", way)
    x = torch.randn(8, 12, dtype=torch.bfloat16)
    a, b = (torch.randn(s, dtype=torch.bfloat16, requires_grad=True) for s in ((4, 12), (6, 4)))
    lora_linear(x, None, a, b, 1.0).sum().backward()
    assert asked == [("lora_dy", (8, 6), 4), ("lora_da", (8, 12), 4)]
    asked.clear()
    lora_linear(x, None, a.detach().float().requires_grad_(), b, 1.0).sum().backward()
    assert asked == [("lora_dy", (8, 6), 4)], "an fp32 A takes no gradient that was rounded to bf16"
