"""Linears from GGUF files that the tests write themselves."""

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import nn

import fusion_compiler as fc
from fusion_compiler import ggml
from fusion_compiler.ggml import q4_0, q8_0

Q4, Q8 = Kind.Q4_0, Kind.Q8_0


def write(path, tensors, architecture="none", **fields):
    """A file of `tensors`: name → (tensor, type)."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        writer.add_uint32(f"{architecture}.{name.replace('__', '.')}", value)
    for name, (tensor, kind) in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def weight():
    return torch.randn(24, 64)


def test_blocks_stay_blocks_and_are_shared_with_the_file(tmp_path, weight):
    path = write(tmp_path / "a.gguf", {"a.weight": (weight, Q4), "a.bias": (torch.ones(24), Kind.F32)})
    linear = fc.gguf.load_linear(path, "a.weight", bias="a.bias")
    assert isinstance(linear, ggml.Linear) and linear.form == "Q4_0"
    assert torch.equal(linear.raw, q4_0.quantise(weight)) and linear.bias.tolist() == [1.0] * 24
    before = path.read_bytes()
    linear.raw.zero_()  # private pages: the file is nobody's to change
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Q8, Kind.Q5_0])
def test_other_types(tmp_path, weight, kind):
    linear = fc.gguf.load_linear(write(tmp_path / "a.gguf", {"a": (weight, kind)}), "a")
    stored = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))
    if kind is Q8:
        assert torch.equal(linear.raw, q8_0.quantise(weight))
    else:
        assert type(linear) is nn.Linear and not linear.weight.requires_grad
        assert torch.equal(linear.weight.float(), stored.to(linear.weight.dtype).float())
    wanted = {Kind.F32: torch.float32, Kind.BF16: torch.bfloat16, Q8: torch.float32}.get(kind, torch.float16)
    assert linear(torch.randn(2, 64, dtype=wanted)).dtype == wanted


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 24), nn.Linear(24, 8, bias=False)

    def forward(self, x):
        return self.b(self.a(x))


def test_linears_are_replaced_by_the_names_of_their_modules(tmp_path, weight):
    model = Two()
    path = write(tmp_path / "a.gguf", {"a.weight": (weight, Q4), "a.bias": (torch.ones(24), Kind.F32)})
    done = fc.gguf.replace_linears(model, path)
    assert done.replaced == {"a": "a.weight"} and list(done.left) == ["b"]
    assert type(model.b) is nn.Linear
    x = torch.randn(3, 64)
    wanted = model.b(nn.functional.linear(x, q4_0.dequantise(q4_0.quantise(weight)), torch.ones(24)))
    assert torch.equal(model(x), wanted)


def test_names_can_be_given(tmp_path, weight):
    model = Two()
    path = write(tmp_path / "a.gguf", {"up.weight": (weight, Q4), "up.bias": (torch.ones(24), Kind.F32)})
    assert fc.gguf.replace_linears(model, path, {"a": "up.weight"}).replaced == {"a": "up.weight"}
    with pytest.raises(fc.gguf.GGUFError, match="names: c: not a linear of the model; it has b"):
        fc.gguf.replace_linears(model, path, {"c": "up.weight"})


def test_a_llama_computes_the_same(tmp_path):
    """Its q and k are interleaved in the file, as converters write them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_hidden_layers=2, **sizes)).eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    tensors = {}
    for place, linear in model.named_modules():
        if isinstance(linear, nn.Linear):
            stored = linear.weight.detach()
            linear.weight.data = q4_0.dequantise(q4_0.quantise(stored))
            heads = {"q_proj": 4, "k_proj": 2}.get(place.split(".")[-1])
            if heads:
                stored = stored.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape_as(stored)
            tensors[f"{names.get_name(place)}.weight"] = (stored, Q4)
    fields = {"block_count": 2, "attention__head_count": 4, "attention__head_count_kv": 2}
    path = write(tmp_path / "llama.gguf", tensors, "llama", **fields)
    ids = torch.randint(128, (1, 9))
    with torch.no_grad():
        wanted = model(ids).logits
        done = fc.gguf.replace_linears(model, path)
        assert len(done.replaced) == 15 and not done.left
        assert torch.equal(model(ids).logits, wanted)


# ---- what is wrong, and where -----------------------------------------------------------------------
def test_a_model_is_left_whole_where_a_shape_differs(tmp_path, weight):
    model = Two()
    before = dict(model.named_modules())
    path = write(tmp_path / "a.gguf", {"b.weight": (torch.randn(8, 64), Q4), "a.weight": (weight, Q4)})
    with pytest.raises(fc.gguf.GGUFError, match=r"b is 8×24, and b.weight of .* is 8×64"):
        fc.gguf.replace_linears(model, path)
    assert dict(model.named_modules()) == before


def test_a_bias_that_the_file_lacks_leaves_the_linear(tmp_path, weight):
    model = Two()
    path = write(tmp_path / "a.gguf", {"a.weight": (weight, Q4), "b.weight": (torch.randn(8, 24), Kind.F32)})
    done = fc.gguf.replace_linears(model, path)
    assert done.left == {"a": "it has a bias, and the file has no a.bias"} and list(done.replaced) == ["b"]


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_truncated_file(tmp_path, weight, share):
    path = write(tmp_path / "a.gguf", {"a.weight": (weight, Q4)})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(fc.gguf.GGUFError, match=r"a\.gguf \(\d+ bytes\) is no GGUF file, or is truncated or damaged"):
        fc.gguf.load_linear(path, "a.weight")


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no GGUF file at"):
        fc.gguf.load_linear(tmp_path / "none.gguf", "a")
    (tmp_path / "text.gguf").write_text("not a model at all, only some words that go on for a while")
    with pytest.raises(fc.gguf.GGUFError, match="magic invalid"):
        fc.gguf.load_linear(tmp_path / "text.gguf", "a")


def test_a_type_that_is_not_known(tmp_path, weight):
    path = write(tmp_path / "a.gguf", {"a.weight": (weight, Q4)})
    held = path.read_bytes()
    kind = held.index(b"a.weight") + len(b"a.weight") + 4 + 2 * 8
    assert held[kind : kind + 4] == int(Q4).to_bytes(4, "little")
    path.write_bytes(held[:kind] + (999).to_bytes(4, "little") + held[kind + 4 :])
    with pytest.raises(fc.gguf.GGUFError, match="of a type that gguf does not know: .*999"):
        fc.gguf.load_linear(path, "a.weight")


def test_tensors_that_are_no_linear(tmp_path, weight):
    path = write(tmp_path / "a.gguf", {"norm.weight": (torch.ones(64), Kind.F32), "a.weight": (weight, Q4)})
    with pytest.raises(fc.gguf.GGUFError, match="has 1 dimensions; the weight of a linear has 2"):
        fc.gguf.load_linear(path, "norm.weight")
    with pytest.raises(fc.gguf.GGUFError, match="no tensor 'a.wieght'; it has a.weight"):
        fc.gguf.load_linear(path, "a.wieght")
    with pytest.raises(fc.gguf.GGUFError, match="architecture 'none'; how rows are ordered is known for gemma"):
        fc.gguf.replace_linears(nn.Sequential(nn.Linear(64, 24)), path)


def test_a_bias_of_another_length_and_rows_that_are_no_heads(tmp_path, weight):
    tensors = {"blk.0.attn_q.weight": (weight, Q4), "blk.0.attn_q.bias": (torch.ones(8), Kind.F32)}
    path = write(tmp_path / "a.gguf", tensors, "llama", block_count=1, attention__head_count=5)
    with pytest.raises(fc.gguf.GGUFError, match=r"attn_q.bias of .* is \(8,\), and blk.0.attn_q.weight has 24 rows"):
        fc.gguf.load_linear(path, "blk.0.attn_q.weight", bias="blk.0.attn_q.bias")
    model = nn.Module()
    model.add_module("model", nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"self_attn": nn.Module()})])}))
    model.model["layers"][0]["self_attn"].q_proj = nn.Linear(64, 24, bias=False)
    with pytest.raises(fc.gguf.GGUFError, match="24 rows, which are not two halves of 5 heads each"):
        fc.gguf.replace_linears(model, path)


def test_numbers_beyond_fp16_do_not_become_infinite(tmp_path):
    path = write(tmp_path / "a.gguf", {"a.weight": (torch.full((24, 64), 1e6), Kind.Q5_0)})
    with pytest.raises(fc.gguf.GGUFError, match="holds numbers beyond fp16"):
        fc.gguf.load_linear(path, "a.weight")


# ---- models as they come ----------------------------------------------------------------------------
def test_plain_weights_have_the_dtype_of_the_model(tmp_path, weight):
    """Files in Q4_0 hold their last linear in another type."""
    model = Two().to(torch.bfloat16)
    last = torch.randn(8, 64)[:, :24].contiguous()
    tensors = {"a.weight": (weight, Q4), "a.bias": (torch.ones(24), Kind.F32), "b.weight": (last, Kind.F16)}
    fc.gguf.replace_linears(model, write(tmp_path / "a.gguf", tensors))
    assert model.b.weight.dtype == torch.bfloat16
    assert model(torch.randn(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_model_without_memory_gets_that_of_the_file(tmp_path, weight):
    with torch.device("meta"):
        model = Two()
    tensors = {"a.weight": (weight, Q4), "a.bias": (torch.ones(24), Kind.F32), "b.weight": (weight[:8, :24], Kind.F32)}
    fc.gguf.replace_linears(model, write(tmp_path / "a.gguf", tensors))
    assert torch.equal(model.a.raw, q4_0.quantise(weight)) and model(torch.randn(2, 64)).shape == (2, 8)


def test_what_stands_twice_is_replaced_twice_and_subclasses_are_left(tmp_path, weight):
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"a": nn.Linear(64, 24, bias=False), "own": Own(64, 24, bias=False)})
    model["again"] = model["a"]
    path = write(tmp_path / "a.gguf", {"a.weight": (weight, Q4), "own.weight": (weight, Q4)})
    done = fc.gguf.replace_linears(model, path)
    assert done.left == {"own": "it is a Own, no plain nn.Linear"}
    assert model["a"] is model["again"] and isinstance(model["a"], ggml.Linear)
    ggml.split(model)
    assert model["a"] is model["again"] and isinstance(model["a"], ggml.SplitLinear)


@pytest.mark.parametrize("change", [lambda m: m.to(torch.bfloat16), lambda m: m.float(), lambda m: m.double()])
def test_scales_stay_what_they_are_in_other_dtypes(weight, change):
    model = nn.Sequential(ggml.Linear(q4_0.quantise(weight)))
    ggml.split(model)
    x = torch.randn(2, 64)
    wanted = model(x)
    change(model)
    assert torch.equal(model[0].raw, q4_0.quantise(weight)) and torch.equal(model(x), wanted)


def test_integers_are_refused(weight):
    model = nn.Sequential(ggml.Linear(q4_0.quantise(weight)))
    x = torch.ones(2, 64, dtype=torch.int64)
    with pytest.raises(TypeError, match="multiplies floating-point x, and this is torch.int64"):
        model(x)
    ggml.split(model)
    with pytest.raises(TypeError, match="multiplies floating-point x"):
        model(x)
