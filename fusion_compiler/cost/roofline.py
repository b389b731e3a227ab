"""Predicted time of kernels.

    seconds = max(flops / (peak · efficiency · utilisation),
                  bytes from memory / bandwidth + bytes from L2 / L2 bandwidth,
                  waves · latency of a wave)  +  launches · overhead

Utilisation is wave quantisation: the last wave of thread blocks leaves units idle. All of it works on numbers and on
sympy expressions alike. Every byte counts, weights included: that is why a small-M matmul has an intensity of about
M flops per byte (at 2 bytes an element) and not of K.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import sympy
import torch

from ..candidates import Amount, Traffic
from ..fused import Attention, Extra, MatmulFamily, MatmulGroup
from ..machine import Machine
from .amounts import amount, at, ceil_div, greater, maximum, minimum, where
from .efficiency import AttentionKernel, efficiency

# Fewer thread blocks than this fraction of the SMs cannot draw the full memory bandwidth.
SATURATING_SMS = 0.5
# Fewer tiles than this fraction of the SMs, and the vendor's GEMM splits K.
BUSY_SMS = 0.75
SPLIT_SMS = 0.6  # fewer even: the parts of K are added up by themselves
FLOAT32_BYTES = 4


def roofline(
    traffic: Traffic,
    machine: Machine,
    dtype: torch.dtype,
    *,
    efficiency: float = 1.0,
    memory_efficiency: float = 1.0,
    l2_bytes: Amount = 0,
    blocks: Amount | None = None,
    blocks_per_sm: int = 1,
    wave_latency: float = 0.0,
) -> Amount:
    """Seconds for `traffic`, of whose bytes `l2_bytes` come from (or stay in) L2.

    `efficiency` is of the machine's matmul rate for `dtype`, `memory_efficiency` of its bandwidths. With `blocks`,
    the number of thread blocks, waves are quantised (`blocks_per_sm` run at once) and too few blocks draw less
    than the full bandwidth. `wave_latency` is the least time a wave takes.
    """
    compute = traffic.flops / (machine.rate(dtype) * efficiency)
    from_memory = traffic.bytes_read + traffic.bytes_written - l2_bytes
    memory = from_memory / (machine.memory_bandwidth * memory_efficiency)
    memory = memory + l2_bytes / (machine.l2_bandwidth * memory_efficiency)
    terms = [compute, memory]
    if blocks is not None:
        slots = machine.num_sms * blocks_per_sm
        waves = ceil_div(blocks, slots)
        terms = [compute * waves * slots / blocks, memory / minimum(1, blocks / (SATURATING_SMS * machine.num_sms))]
        if wave_latency:
            terms.append(waves * wave_latency)
    return maximum(*terms) + traffic.launches * machine.launch_overhead


# ---- matmuls ------------------------------------------------------------------------------------
def matmul_traffic(op: MatmulFamily | MatmulGroup) -> Traffic:
    """One kernel for all of it: x, weights, norm parameters and extras read once, the results written once."""
    norm, item, m, k = op.whole.norm, op.dtype.itemsize, amount(op.m), amount(op.whole.k)
    shared = item * k * (m + (norm.has_weight + norm.has_bias if norm else 0))
    if op.whole.activation:
        shared = _extra_bytes(op.whole.inputs, m, k)
    total = Traffic(0, shared, 0, 1)
    for part in op.parts:
        n = amount(part.n)
        read = (sum(p.bytes_per_weight for p in part.packed) if part.packed else item * part.weights) * k * n
        read += _extra_bytes(part.extras, m, n)
        total = total + Traffic(2 * part.weights * m * k * n, read, part.out_dtype.itemsize * m * n, 0)
    return total


def _extra_bytes(extras: Iterable[Extra], rows: Amount, columns: Amount) -> Amount:
    sizes: dict[str, Amount] = {"full": rows * columns, "row": rows, "col": columns, "scalar": 1}
    return sum((extra.dtype.itemsize * sizes[extra.kind] for extra in extras), 0)


def intensity(traffic: Traffic) -> Amount:
    """Flops per byte, all traffic counted."""
    return traffic.flops / (traffic.bytes_read + traffic.bytes_written)


def gated_mlp_activation_bytes(m: Amount, n: Amount, itemsize: int) -> dict[str, Amount]:
    """Bytes of gate and up activations [M, N] that pass through global memory, by strategy.

    vector: two GEMMs write gate and up, one kernel reads both for silu(gate)·up: 4·M·N elements.
    matmul: silu in the accumulator of the gate GEMM, whose result the up GEMM's epilogue reads: 2·M·N elements.
    kernel: both GEMMs, silu and product in one kernel: none.
    """
    return {"vector": 4 * m * n * itemsize, "matmul": 2 * m * n * itemsize, "kernel": 0}


def matmul_facts(op: MatmulFamily, sizes: Mapping[sympy.Symbol, int]) -> tuple[tuple[str, float], ...]:
    """Figures for the report, at the given values of the symbols."""
    facts = [("flops_per_byte", round(at(intensity(matmul_traffic(op)), sizes), 2))]
    if op.weights == 2:
        strategies = gated_mlp_activation_bytes(amount(op.m), amount(op.n), op.dtype.itemsize)
        facts += [(f"activation_bytes_{name}_level", at(count, sizes)) for name, count in strategies.items()]
    return tuple(facts)


@functools.lru_cache(maxsize=1024)  # the layers of a model ask for the same
def library_matmul_seconds(
    m: Amount, n: Amount, k: Amount, dtype: torch.dtype, machine: Machine, *, batch: Amount = 1, l2_bytes: Amount = 0,
    traffic: Traffic | None = None,
) -> Amount:  # fmt: skip
    """The vendor's (batched) GEMM at its measured efficiency, choosing its tile; launch included.

    A tile never has more rows than M rounded up to 16. Library kernels overlap part of the last wave (stream-K,
    persistent schedules), so a broken wave costs half of what it would.
    """
    found = efficiency(machine).library_matmul
    batched = batch != 1
    if traffic is None:
        item = dtype.itemsize
        traffic = Traffic(2 * batch * m * n * k, item * batch * (m * k + k * n), item * batch * m * n, 1)
    reached = machine.rate(dtype) * (found.batched_compute if batched else found.compute).of(dtype)
    memory_fraction = found.batched_memory if batched else found.memory
    memory = (traffic.bytes_read + traffic.bytes_written - l2_bytes) / (machine.memory_bandwidth * memory_fraction)
    memory = memory + l2_bytes / (machine.l2_bandwidth * memory_fraction) + found.latency + found.depth * k**0.75
    times = []
    for tile_m, tile_n, fraction in found.tiles:
        rows = minimum(tile_m, maximum(16, 16 * ceil_div(m, 16)))
        blocks = batch * ceil_div(m, rows) * ceil_div(n, tile_n)
        waves = blocks / machine.num_sms
        tile_seconds = 2 * rows * tile_n * k / (reached * fraction / machine.num_sms)
        if found.operands:
            # long sums over small tiles read far more than they multiply; what each operand is read first, memory gives
            again = dtype.itemsize * k * (rows + tile_n - batch * (m + n) / maximum(1, blocks))
            tile_seconds = maximum(tile_seconds, again * machine.num_sms / (machine.l2_bandwidth * found.operands))
        times.append(maximum(1, (waves + ceil_div(waves, 1)) / 2) * tile_seconds)
        if found.split_seconds:
            # where K is split, as many blocks as there are units leave their sums in L2, to be read again
            moved = 2 * FLOAT32_BYTES * rows * tile_n * machine.num_sms
            sums = where(greater(SPLIT_SMS, waves), moved / (machine.l2_bandwidth * found.sums), 0.0)
            times.append(where(greater(1, waves), waves, waves + 1) * tile_seconds + sums)
    if found.tiles and found.split_seconds:
        # the last tile is the smallest: where even that is too large to keep the units busy, K is split
        memory = memory + where(greater(BUSY_SMS, waves), found.split_seconds, 0.0)
    compute = minimum(*times) if times else traffic.flops / reached
    exposed = (1 - found.overlap) * minimum(compute, memory)
    return maximum(compute, memory) + exposed + traffic.launches * machine.launch_overhead


# ---- attention ----------------------------------------------------------------------------------
def attention_traffic(op: Attention) -> Traffic:
    """A flash kernel: q, k, v (and a mask tensor) read once, the output written once; masked-out pairs not computed
    where the mask is causal."""
    b, h, hk, lq, lk = (amount(s) for s in (op.batch, op.heads, op.kv_heads, op.q_len, op.kv_len))
    item = op.dtype.itemsize
    read = item * (b * h * lq * op.head_dim + b * hk * lk * (op.head_dim + op.v_dim))
    if _as_tensor(op):
        read += item * lq * lk
    written = b * h * lq * (item * op.v_dim + (4 if op.logarithm is not None else 0))
    return Traffic(2 * b * h * lq * visible_keys(op) * (op.head_dim + op.v_dim), read, written, 1)


def visible_keys(op: Attention, key_block: int = 0) -> Amount:
    """Mean number of keys per query that a kernel visits which skips `key_block` keys at a time."""
    lq, lk = amount(op.q_len), amount(op.kv_len)
    if op.mask.kind != "causal" or op.mask.position:
        return lk  # what a device-side position leaves visible is not known when compiling
    # queries i = 0 … lq−1 see i + offset + 1 keys; a kernel rounds up to its block
    mean = amount(op.mask.offset) + (lq + key_block) / 2
    if op.mask.window is not None:
        full = op.mask.window + key_block
        mean = minimum(mean, full)
        offset = amount(op.mask.offset)
        if isinstance(lq, int) and isinstance(offset, int):  # the first queries have fewer keys before them
            first = min(lq, max(0, op.mask.window - offset))
            mean = (first * (offset + (first + key_block) / 2) + (lq - first) * full) / lq
    if op.mask.chunk is not None:
        mean = minimum(mean, (op.mask.chunk + key_block) / 2)
    return minimum(lk, mean)


def _as_tensor(op: Attention) -> bool:
    """Whether a kernel that knows only "no mask" and top-left causal needs the mask as a tensor."""
    return op.mask.kind != "none" and not op.mask.is_top_left


def attention_seconds(op: Attention, machine: Machine, backend: str, *, masked: bool | None = None) -> Amount:
    """Predicted time of one scaled-dot-product kernel, launch included.

    `backend`: "cudnn", "flash", "efficient", "flex" on GPUs, "cpu_flash" on CPUs; "math" is the unfused composition.
    `masked`: the mask is passed as a tensor, so every score is computed; by default where torch's SDPA needs that.
    """
    as_tensor = _as_tensor(op) if masked is None else masked
    b, h, lq, lk = (amount(s) for s in (op.batch, op.heads, op.q_len, op.kv_len))
    if backend == "math":
        return unfused_attention_seconds(b * h, lq, lk, op.head_dim, op.v_dim, op.dtype, machine)
    traffic = attention_traffic(op)
    keys = lk if as_tensor else visible_keys(op, _attention_kernel(machine, backend, as_tensor).key_block)
    return flash_seconds(
        machine, backend, op.dtype, masked=as_tensor, heads=b * h, q_len=lq, kv_len=lk,
        flops=2 * b * h * lq * keys * (op.head_dim + op.v_dim), moved=traffic.bytes_read + traffic.bytes_written,
        whole=op.mask.kind == "none",
    )  # fmt: skip


def flash_seconds(
    machine: Machine, backend: str, dtype: torch.dtype, *, masked: bool, heads: Amount, q_len: Amount, kv_len: Amount,
    flops: Amount, moved: Amount, whole: bool,
) -> Amount:  # fmt: skip
    """A flash kernel that computes `flops` and moves `moved` bytes, launch included; `heads`: of the whole batch;
    `whole`: nothing is masked."""
    kernel = _attention_kernel(machine, backend, masked)
    compute = flops / (machine.rate(dtype) * kernel.compute.of(dtype))
    compute = compute if whole else compute * (1 + kernel.ramp / kv_len)
    if kernel.short_compute is not None:
        ratio = kernel.compute.of(dtype) / kernel.short_compute.of(dtype)
        compute = compute * where(greater(kernel.short_rows, q_len), ratio, 1.0)
    if kernel.query_block:
        blocks = ceil_div(q_len, kernel.query_block)
        # a block is computed whole, by one multiprocessor
        busy = maximum(1.0, kernel.alone * machine.num_sms / (heads * blocks)) * blocks * kernel.query_block / q_len
        compute = compute * (where(greater(q_len, 1), busy, 1.0) if kernel.splits_keys else busy)
    memory = moved / (machine.memory_bandwidth * kernel.memory)
    return maximum(compute, memory) + kernel.latency + machine.launch_overhead


def _attention_kernel(machine: Machine, backend: str, masked: bool) -> AttentionKernel:
    known = efficiency(machine).attention
    if backend not in known:
        names = ", ".join([*known, "math"])
        raise ValueError(f"no efficiency data for attention backend {backend!r} on {machine.name}; there is: {names}")
    # measured with cuDNN; flash-2 takes no mask tensor at all
    return known["masked"] if masked and "masked" in known and backend in ("cudnn", "flash") else known[backend]


def unfused_attention_seconds(
    batch: Amount, q_len: Amount, kv_len: Amount, head_dim: int, v_dim: int, dtype: torch.dtype, machine: Machine
) -> Amount:
    """Scores written, softmax, probabilities read again: what SDPA's "math" path does."""
    scores = dtype.itemsize * batch * q_len * kv_len
    qk = library_matmul_seconds(q_len, kv_len, head_dim, dtype, machine, batch=batch)
    pv = library_matmul_seconds(q_len, v_dim, kv_len, dtype, machine, batch=batch)
    softmax = 4 * scores / (machine.memory_bandwidth * efficiency(machine).reduction.memory)
    return qk + pv + softmax + 2 * machine.launch_overhead
