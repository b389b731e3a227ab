"""Functions that make float16 and bfloat16 of codes, most of them in PTX, four codes at a time.

A byte with 0x64 (0x43) above it is the float16 1024 + byte (the bfloat16 128 + byte, of at most seven bits), so nothing
has to be converted. Triton converts codes one by one and, worse, moves them to the threads that need them byte by byte.
It does not look into these functions: they make numbers where a tile was read, and numbers are what is moved.
"""

from __future__ import annotations

import torch

from ....fused import Codes

TYPES = {torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16"}


def widening(name: str, codes: Codes, dtype: torch.dtype) -> str:
    """The text of a function `name` of a tile of codes, whose numbers are given as `dtype`; of packed codes the low and
    the high ones."""
    of = TYPES[dtype]
    if codes.packed:
        return _in_ptx(name, _halves(dtype), 4, f"({of}, {of})")
    if codes.dtype.is_floating_point:
        # bfloat16 straight from float16 takes instructions of a sixteenth of the rate
        wide = "codes.to(tl.float16)" + (".to(tl.float32).to(tl.bfloat16)" if dtype == torch.bfloat16 else "")
        return f"""@triton.jit
def {name}(codes):
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [{wide}], dtype={of}, is_pure=False, pack=2)


"""
    return _in_ptx(name, _bytes(dtype, signed=codes.dtype == torch.int8), 2, of)


def _in_ptx(name: str, body: str, registers: int, returned: str) -> str:
    return f"""@triton.jit
def {name}(codes):
    return tl.inline_asm_elementwise(
        "{{ {body} }}",
        "{"=&r," * registers}r", [codes], dtype={returned}, is_pure=False, pack=4,
    )


"""


def _merged(first: int, low: str, above: str) -> str:
    """Registers `first` and the next, of two numbers each, from the four bytes of `low` with a byte of `above` over
    each."""
    return f"prmt.b32 ${first}, {low}, {above}, 0x4140; prmt.b32 ${first + 1}, {low}, {above}, 0x4342; "


def _added(registers: int, dtype: torch.dtype, number: int) -> str:
    """A number, given as its bits, added to all; bfloat16 has no addition before sm_90, so it is 1 · a + b there."""
    word = f"mov.b32 c, {number * 0x10001:#x}; "
    if dtype == torch.float16:
        return word + "".join(f"add.f16x2 ${i}, ${i}, c; " for i in range(registers))
    one = "mov.b32 one, 0x3f803f80; "
    return word + one + "".join(f"fma.rn.bf16x2 ${i}, ${i}, one, c; " for i in range(registers))


def _halves(dtype: torch.dtype) -> str:
    above, less = ("0x64646464", 0xE400) if dtype == torch.float16 else ("0x43434343", 0xC300)
    return (
        ".reg .b32 a, b, c, one; and.b32 a, $4, 0x0f0f0f0f; shr.u32 b, $4, 4; and.b32 b, b, 0x0f0f0f0f; "
        f"mov.b32 c, {above}; {_merged(0, 'a', 'c')}{_merged(2, 'b', 'c')}{_added(4, dtype, less)}"
    )


def _bytes(dtype: torch.dtype, *, signed: bool) -> str:
    """Signed ones are counted from −128."""
    start = f".reg .b32 a, b, c, t, u, one; xor.b32 a, $2, {'0x80808080' if signed else '0'}; "
    if dtype == torch.float16:
        less = 0xE480 if signed else 0xE400  # −1152 or −1024
        return f"{start}mov.b32 c, 0x64646464; {_merged(0, 'a', 'c')}{_added(2, dtype, less)}"
    # 16 · (128 + high half) − 2176 or − 2048, and to that the low half
    from_128 = "0xc508c508" if signed else "0xc500c500"
    return (
        f"{start}shr.u32 b, a, 4; and.b32 b, b, 0x0f0f0f0f; and.b32 a, a, 0x0f0f0f0f; mov.b32 c, 0x43434343; "
        f"prmt.b32 t, b, c, 0x4140; prmt.b32 u, b, c, 0x4342; {_merged(0, 'a', 'c')}{_added(2, dtype, 0xC300)}"
        f"mov.b32 b, 0x41804180; mov.b32 c, {from_128}; fma.rn.bf16x2 t, t, b, c; fma.rn.bf16x2 u, u, b, c; "
        "fma.rn.bf16x2 $0, $0, one, t; fma.rn.bf16x2 $1, $1, one, u; "
    )
