"""What a CPU multiplies fast: asked of torch and the system, limited by ONEDNN_MAX_CPU_ISA."""

from __future__ import annotations

import pytest
import torch

from str_kernels.engine import cpu


@pytest.fixture
def asked(monkeypatch):
    """Ask anew, on a pretended x86 CPU that has everything."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for name in ("_is_vnni_supported", "_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True, raising=False)
    monkeypatch.setattr(cpu, "_mkl_is_held_back", lambda: True)
    return cpu._ask.__wrapped__


def test_each_answer_is_torchs(asked, monkeypatch):
    """One instruction set missing takes away its own answer and no other."""
    everything = cpu.Cpu(bf16=True, int8=True, amx=True, onednn_fp32=True, known=False)
    assert asked() == everything
    for name, field in (
        ("_is_vnni_supported", "int8"),
        ("_is_amx_tile_supported", "amx"),
        ("_is_avx512_bf16_supported", "bf16"),
    ):
        with monkeypatch.context() as without:
            without.setattr(torch.cpu, name, lambda: False)
            found = vars(asked())
            known = field == "amx"  # int8 on AMX is what nobody measured
            assert found == vars(everything) | {field: False, "known": known}


def test_other_kinds_of_cpu_are_unknown(asked, monkeypatch):
    """What is fast on a CPU that is no x86 is measured."""
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not asked().known


def test_without_onednn_nothing_is_fast(asked, monkeypatch):
    """A torch built without oneDNN has none of its operators."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert asked() == cpu.Cpu()


@pytest.mark.parametrize(
    ("level", "fast"),
    [
        ("AVX2", set()),
        ("AVX512_CORE", {"onednn_fp32"}),
        ("avx512_core_vnni", {"onednn_fp32", "int8"}),
        ("AVX512_CORE_BF16", {"onednn_fp32", "int8", "bf16"}),
        ("AVX512_CORE_AMX", {"onednn_fp32", "int8", "bf16", "amx"}),
        ("ALL", {"onednn_fp32", "int8", "bf16", "amx"}),
    ],
)
def test_onednn_may_be_told_to_use_less(asked, monkeypatch, level, fast):
    """Instructions that ONEDNN_MAX_CPU_ISA forbids are not counted on."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", level)
    found = vars(asked())
    assert found.pop("known") == ("amx" not in fast)
    assert {name for name, value in found.items() if value} == fast


@pytest.mark.parametrize(
    ("vendor", "capability", "held_back"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
    ],
)
def test_where_mkl_is_held_back(monkeypatch, vendor, capability, held_back):
    """On AMD with AVX-512 alone: elsewhere nothing was measured."""
    monkeypatch.setattr(cpu, "processor_field", lambda name: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    has = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    assert cpu._mkl_is_held_back() == (held_back and has)
