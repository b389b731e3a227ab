"""The table of machines, its names, and detection from a device's properties."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusion_compiler.machine import TABLE, cpu_machine, from_properties, machine


def properties(name: str, sms: int, major: int = 9, minor: int = 0, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(name=name, multi_processor_count=sms, major=major, minor=minor, **more)


def test_the_table_holds_the_machines_asked_for() -> None:
    assert set(TABLE) == {"h200", "h100", "a100", "l4", "rtx4090", "v100", "mi300x"}
    assert all(m.source for m in TABLE.values())


def test_h200_has_the_measured_rates() -> None:
    h200 = machine("h200")
    assert h200.memory_bandwidth == pytest.approx(4.3e12)
    assert h200.flops[torch.bfloat16] == pytest.approx(790e12)
    assert (h200.l2_bytes, h200.num_sms, h200.shared_memory) == (60 * 2**20, 132, 232448)


def test_other_machines_are_derated_by_what_the_h200_reached() -> None:
    h200 = machine("h200")
    for name, tb_s, half in (("h100", 3.35, 989), ("a100", 2.039, 312), ("l4", 0.3, 121), ("mi300x", 5.3, 1307)):
        other = machine(name)
        assert other.memory_bandwidth / (tb_s * 1e12) == pytest.approx(h200.memory_bandwidth / 4.8e12)
        assert other.flops[torch.float16] / (half * 1e12) == pytest.approx(h200.flops[torch.float16] / 989e12)


def test_unknown_name_lists_what_exists() -> None:
    with pytest.raises(ValueError, match="unknown machine 'h300'; known: h200, .*mi300x, cpu"):
        machine("h300")
    with pytest.raises(TypeError, match="not int"):
        machine(90)  # type: ignore[arg-type]


def test_a_machine_is_itself() -> None:
    mine = cpu_machine(8, 2**25, "avx2")
    assert machine(mine) is mine


def test_detection_maps_onto_the_table_by_name() -> None:
    assert from_properties(properties("NVIDIA H200", 132), "cuda") is TABLE["h200"]
    assert from_properties(properties("NVIDIA A100-SXM4-80GB", 108, 8, 0), "cuda") is TABLE["a100"]
    assert from_properties(properties("NVIDIA GeForce RTX 4090", 128, 8, 9), "cuda") is TABLE["rtx4090"]
    assert (
        from_properties(properties("AMD Instinct MI300X", 304, gcnArchName="gfx942:sramecc+"), "rocm")
        is TABLE["mi300x"]
    )


def test_a_name_within_another_is_not_taken_for_it() -> None:
    found = from_properties(properties("NVIDIA L40S", 142, 8, 9), "cuda")
    assert found.name == "nvidia-l40s" and "scaled from l4" in found.source


def test_an_unknown_device_is_scaled_from_the_nearest_architecture() -> None:
    found = from_properties(
        properties("NVIDIA A10", 72, 8, 6, L2_cache_size=6 * 2**20, shared_memory_per_block_optin=101376,
                   memory_clock_rate=6251000, memory_bus_width=384), "cuda",
    )  # fmt: skip
    a100 = TABLE["a100"]
    assert found.arch == "sm_86" and found.num_sms == 72 and found.l2_bytes == 6 * 2**20
    assert found.flops[torch.bfloat16] == pytest.approx(a100.flops[torch.bfloat16] * 72 / 108)
    assert found.memory_bandwidth == pytest.approx(600e9 * 4.3 / 4.8, rel=0.01)  # data sheet: 600 GB/s
    assert found.shared_memory == 101376


def test_bf16_without_instructions_is_slower_than_fp32_on_a_cpu() -> None:
    plain, native, amx = (cpu_machine(2, 2**25, simd) for simd in ("avx512", "avx512_bf16", "amx"))
    assert plain.rate(torch.bfloat16) < plain.rate(torch.float32)
    assert native.rate(torch.float32) < native.rate(torch.bfloat16) < amx.rate(torch.bfloat16)


def test_cpu_is_detected_the_same_every_time_and_follows_the_threads_of_torch() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = machine("cpu")
        assert one.num_sms == 1 and machine("cpu") == one
        torch.set_num_threads(2)
        assert machine("cpu").flops[torch.float32] == 2 * one.flops[torch.float32]
    finally:
        torch.set_num_threads(before)
    assert one.kind == "cpu" and one.l2_bytes >= 2**20


def test_unknown_simd_level_is_refused() -> None:
    with pytest.raises(ValueError, match="known: amx"):
        cpu_machine(2, 2**25, "sse")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
def test_the_gpu_at_hand_is_detected() -> None:
    found = machine()
    assert found.kind in ("cuda", "rocm")
    assert found.num_sms == torch.cuda.get_device_properties(0).multi_processor_count
