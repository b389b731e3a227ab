"""The block formats of ggml, bit for bit against the `gguf` package."""

import gguf
import numpy as np
import pytest
import torch

import fusion_compiler as fc
from fusion_compiler import ggml
from fusion_compiler.ggml import blocks, q4_0, q8_0, q8_1
from fusion_compiler.ggml.activations import KINDS, activations

WEIGHTS = (q4_0, q8_0)


def awkward(seed=0):
    """Rows of every magnitude, with blocks of zeros, ties of the largest element and halves to round."""
    x = torch.randn(48, 256, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-6, 3, 48)[:, None]
    x[3] = 0
    x[4, 32:64] = 0
    x[5, ::2], x[5, 1::2] = -2.0, 2.0
    x[6, ::2], x[6, 1::2] = 2.0, -2.0
    x[7] = torch.arange(256) / 2 - 64
    return x


@pytest.mark.parametrize("form", WEIGHTS, ids=lambda f: f.NAME)
@pytest.mark.parametrize("seed", range(3))
def test_bytes_are_those_of_gguf(form, seed):
    x, kind = awkward(seed), gguf.GGMLQuantizationType[form.NAME]
    theirs = gguf.quants.quantize(x.numpy(), kind)
    assert np.array_equal(form.quantise(x).numpy(), theirs)
    assert np.array_equal(form.dequantise(torch.from_numpy(theirs)).numpy(), gguf.quants.dequantize(theirs, kind))


def test_q8_1_has_the_codes_of_q8_0_and_their_sum():
    x = awkward()[:40]
    d, s, codes = q8_1.parts(q8_1.quantise(x))
    d0, codes0 = q8_0.parts(q8_0.quantise(x))
    assert torch.equal(codes, codes0) and torch.equal(d, d0)
    unrounded = x.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    assert torch.equal(s, (unrounded * codes.float().sum(-1, keepdim=True)).half())


def test_halves_are_rounded_away_from_zero():
    assert blocks.rounded(torch.tensor([0.5, 1.5, 2.5, -0.5, -2.5, 0.49999997])).tolist() == [1, 2, 3, -1, -3, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_product_is_near_that_of_dequantised_weights(kind):
    x, raw = activations(kind, (4, 4096), seed=1), q4_0.quantise(torch.randn(64, 4096))
    through = x.double() @ q4_0.dequantise(raw, torch.float64).T
    got = ggml.exact(x, raw)
    assert got.shape == (4, 64)
    assert (got - through).square().sum() <= 5e-4 * through.square().sum()
    if kind == "normal":  # and not nearer, for the activations are quantised too
        assert (got - through).square().sum() >= 1e-5 * through.square().sum()


def test_activations_are_the_same_for_a_seed():
    assert torch.equal(activations("outliers", (2, 64), 3), activations("outliers", (2, 64), 3))
    assert not torch.equal(activations("normal", (2, 64), 3), activations("normal", (2, 64), 4))
    assert activations("outliers", (8, 4096)).abs().max() > 20 > activations("normal", (8, 4096)).abs().max()
    with pytest.raises(ValueError, match="there are uniform, normal"):
        activations("gaussian", (2, 64))


@pytest.mark.parametrize("form", [q4_0, q8_0, q8_1], ids=lambda f: f.NAME)
def test_what_cannot_be_quantised_is_refused(form):
    for bad in (float("inf"), float("-inf"), float("nan")):
        with pytest.raises(ValueError, match=f"{form.NAME} has no code for inf and NaN"):
            form.quantise(torch.tensor([bad] + [1.0] * 31))
    with pytest.raises(ValueError, match="not a multiple"):
        form.quantise(torch.ones(2, 33))
    with pytest.raises(ValueError, match="not torch.int8"):
        form.quantise(torch.ones(32, dtype=torch.int8))
    with pytest.raises(ValueError, match="exceeds fp16"):
        form.quantise(torch.full((32,), 1e9))
    with pytest.raises(ValueError, match=f"{form.NAME} is uint8 with {form.BYTES} bytes a block"):
        form.parts(torch.zeros(2, form.BYTES + 1, dtype=torch.uint8))


@pytest.mark.parametrize("form", WEIGHTS, ids=lambda f: f.NAME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear(form, dtype):
    raw, bias = form.quantise(torch.randn(24, 64)), torch.randn(24)
    linear, x = ggml.Linear(raw, bias, form=form.NAME), torch.randn(2, 3, 64).to(dtype)
    assert linear.raw.data_ptr() == raw.data_ptr()  # shared, not copied
    wanted = torch.nn.functional.linear(x, form.dequantise(raw, dtype), bias.to(dtype))
    assert torch.equal(linear(x), wanted) and linear(x).dtype == dtype
    with torch.no_grad():
        compiled = torch.compile(linear, backend=fc.backend.fusion_compiler, options={"remainder": "eager"})
        assert torch.equal(compiled(x), wanted)


def test_a_linear_checks_what_it_is_given():
    raw = q4_0.quantise(torch.randn(24, 64))
    with pytest.raises(ValueError, match="there are Q4_0, Q8_0"):
        ggml.Linear(raw, form="Q4_K")
    with pytest.raises(ValueError, match="Q8_0 is uint8 with 34 bytes"):
        ggml.Linear(raw, form="Q8_0")
    with pytest.raises(ValueError, match="weight has 24 rows"):
        ggml.Linear(raw, torch.zeros(23))
    with pytest.raises(ValueError, match="are \\[N, K/32"):
        ggml.Linear(raw[0])
