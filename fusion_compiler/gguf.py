"""Linears from GGUF files, in the blocks that the file holds them in.

    import fusion_compiler as fc
    replaced = fc.gguf.replace_linears(model, "llama-q4_0.gguf")

Reading is left to the `gguf` package (`pip install fusion_compiler[gguf]`). The file is mapped into memory: weights are
read when they are first used, and two linears of one tensor share it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .ggml import Linear
from .ggml.linear import FORMATS

# How the rows of q and k lie in files of an architecture: as the models of transformers have them, or with the two
# halves of each head interleaved, for a rotary embedding of neighbours.
AS_IN_TRANSFORMERS = frozenset({"gemma", "gemma2", "gemma3", "phi3", "qwen2", "qwen3", "stablelm", "starcoder2"})
INTERLEAVED = frozenset({"llama"})
_PLAIN = {"F32": torch.float32, "F16": torch.float16}


class GGUFError(ValueError):
    """A GGUF file that cannot be read, or does not hold what was asked of it."""


@dataclass(frozen=True)
class Replaced:
    """What `replace_linears` did: module paths and the tensor each has now, and those left with the reason."""

    replaced: Mapping[str, str]
    left: Mapping[str, str]


def load_linear(path: str | os.PathLike[str], name: str, bias: str | None = None) -> nn.Module:
    """The linear whose weight is tensor `name` [N, K] of the file, and whose bias is tensor `bias` [N].

    Q4_0 and Q8_0 stay in their blocks (`fusion_compiler.ggml.Linear`, sharing the file's memory); F32, F16 and BF16
    become an `nn.Linear` of that type; any other type that `gguf` can dequantise is dequantised once, into fp16.

    Raises GGUFError (a ValueError) for a file that is no GGUF or is truncated, a type that is not known or whose
    numbers exceed fp16, a tensor that is not there or is no matrix, a bias of another length; FileNotFoundError;
    ImportError without the `gguf` package.
    """
    return _File(path).linear(name, bias)


def replace_linears(model: nn.Module, path: str | os.PathLike[str], names: Mapping[str, str] | None = None) -> Replaced:
    """Put the weights of a GGUF file in the place of the `nn.Linear` modules of `model`, in place.

    A linear at module path p takes tensor `names[p]`; without `names`, p + ".weight" in a file that calls its tensors
    as the model does, and otherwise what GGUF's naming gives p for the architecture in the file, as for the models of
    transformers. Where such a file interleaves the rows of q and k (Llama's do), they are put back in order, which
    copies these two. Biases come with their weights. Nothing but linears is loaded. A linear for which the file has no
    tensor is left, and so is a subclass of `nn.Linear`, whose owner may count on more than its product. A module that
    stands at several paths is replaced at all of them.

    New linears stand on the device of the old ones, or on the CPU where those were on `meta`; plain ones have the old
    one's dtype, whatever type the file has.

    All is checked before anything is replaced. Raises GGUFError for what `load_linear` raises it for, for a weight or
    bias of another shape than the linear's, a name of `names` that is no linear of the model, and if not one linear is
    found.
    """
    file = _File(path)
    linears = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear)}
    as_modules = any(f"{p}.weight" in file.tensors for p in linears)
    unknown = sorted(set(names or ()) - set(linears))
    if unknown:
        raise GGUFError(
            f"names: {', '.join(unknown)}: not a linear of the model; it has {', '.join(linears) or 'none'}"
        )
    made: dict[nn.Module, nn.Module] = {}
    replaced: dict[str, str] = {}
    left: dict[str, str] = {}
    for place, linear in linears.items():
        if names is not None:
            tensor = names.get(place, "")
        else:
            tensor = f"{place}.weight" if as_modules else file.name_of(place)
        if tensor not in file.tensors:
            left[place] = f"the file has no tensor {tensor}" if tensor else "no name is known for it"
            continue
        if type(linear) is not nn.Linear:
            left[place] = f"it is a {type(linear).__name__}, no plain nn.Linear"
            continue
        bias = tensor.removesuffix(".weight") + ".bias"
        heads = 0 if names is not None or as_modules else file.heads_of(tensor)
        new = file.linear(tensor, bias if bias in file.tensors else None, heads, linear.weight.dtype)
        wanted = linear.out_features, linear.in_features
        if (new.out_features, new.in_features) != wanted:
            raise GGUFError(
                f"{place} is {wanted[0]}×{wanted[1]}, and {tensor} of {file.path} is "
                f"{new.out_features}×{new.in_features}"
            )
        if new.bias is None and linear.bias is not None:
            left[place] = f"it has a bias, and the file has no {bias}"
            continue
        device = linear.weight.device
        made[linear], replaced[place] = new if device.type == "meta" else new.to(device), tensor
    if not made:
        held = f"it holds {', '.join([*file.tensors][:8])} …" if file.tensors else "it holds none"
        why = f", and {'; '.join(f'{place}: {reason}' for place, reason in list(left.items())[:2])}"
        raise GGUFError(f"no linear of the model has a tensor in {file.path}; {held}{why if left else ''}")
    for place, module in list(model.named_modules(remove_duplicate=False)):
        if module in made:
            model.set_submodule(place, made[module])
    return Replaced(replaced, left)


class _File:
    """An open GGUF file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        reader = _read(self.path)
        self._fields = reader.fields
        self.tensors: dict[str, Any] = {t.name: t for t in reader.tensors}
        self._architecture: str = self._field("general.architecture", "")
        self._names: Any = None

    def linear(
        self, name: str, bias: str | None, heads: int = 0, dtype: torch.dtype | None = None
    ) -> Linear | nn.Linear:
        """The linear of these tensors, a plain one in `dtype` where that is given; the rows of each of `heads` heads
        are put in order, where it is not 0."""
        held = self._tensor(name)
        kind = held.tensor_type.name
        if len(held.shape) != 2:
            raise GGUFError(f"{name} of {self.path} has {len(held.shape)} dimensions; the weight of a linear has 2")
        rows = int(held.shape[1])
        if heads and rows % (2 * heads):
            raise GGUFError(f"{name} of {self.path} has {rows} rows, which are not two halves of {heads} heads each")
        offsets = self._numbers(bias, dtype) if bias is not None else None
        if offsets is not None and offsets.shape != (rows,):
            raise GGUFError(f"{bias} of {self.path} is {tuple(offsets.shape)}, and {name} has {rows} rows")
        if kind in FORMATS:
            raw = _in_order(torch.from_numpy(held.data), heads)
            return Linear(raw, offsets if offsets is None else _in_order(offsets, heads), form=kind)
        weight = _in_order(self._numbers(name, dtype), heads)
        made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        made.weight = nn.Parameter(weight, requires_grad=False)
        if offsets is not None:
            made.bias = nn.Parameter(_in_order(offsets, heads).to(weight.dtype), requires_grad=False)
        return made

    def name_of(self, place: str) -> str:
        """The tensor of a module of transformers by GGUF's naming, or ""."""
        if self._names is None:
            self._names = self._mapping()
        found = self._names.get_name(place)
        return f"{found}.weight" if found else ""

    def heads_of(self, tensor: str) -> int:
        """The number of heads whose rows are interleaved in `tensor`, or 0."""
        which = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(tensor.split(".")[-2])
        if self._architecture not in INTERLEAVED or which is None:
            return 0
        heads = self._field(f"{self._architecture}.attention.{which}", 0)
        heads = heads or self._field(f"{self._architecture}.attention.head_count", 0)
        if not isinstance(heads, int) or heads <= 0:
            raise GGUFError(f"{self.path} does not say how many heads {tensor} has ({which})")
        return heads

    def _mapping(self) -> Any:
        import gguf

        known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        if self._architecture not in AS_IN_TRANSFORMERS | INTERLEAVED:
            raise GGUFError(
                f"{self.path} is of architecture {self._architecture or 'unknown'!r}; how rows are ordered is known "
                f"for {', '.join(sorted(AS_IN_TRANSFORMERS | INTERLEAVED))}. Pass names={{module path: tensor name}} "
                "for tensors that lie as the model has them"
            )
        layers = self._field(f"{self._architecture}.block_count", 0)
        return gguf.get_tensor_name_map(known[self._architecture], layers)

    def _field(self, name: str, default: Any) -> Any:
        field = self._fields.get(name)
        try:
            return default if field is None else field.contents()
        except UnicodeDecodeError as error:
            raise GGUFError(f"{self.path} is damaged: {name} is no text ({error})") from error

    def _tensor(self, name: str) -> Any:
        if name not in self.tensors:
            import difflib

            near = difflib.get_close_matches(name, self.tensors, 3) or [*self.tensors][:8]
            raise GGUFError(f"{self.path} has no tensor {name!r}; it has {', '.join(near)} …")
        return self.tensors[name]

    def _numbers(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """A tensor as numbers in `dtype`; without one in its own type where torch has it, else as fp16."""
        import gguf

        held = self._tensor(name)
        kind = held.tensor_type.name
        if kind in _PLAIN:
            stored = torch.from_numpy(held.data)
        elif kind == "BF16":
            stored = torch.from_numpy(held.data).view(torch.bfloat16)
        else:
            try:
                stored = torch.from_numpy(gguf.quants.dequantize(held.data, held.tensor_type))
            except NotImplementedError as error:
                why = f"is of type {kind}, which cannot be dequantised: {error}"
                raise GGUFError(f"{name} of {self.path} {why}") from error
            dtype = dtype or torch.float16
        numbers = stored.to(dtype or stored.dtype)
        if numbers.dtype == torch.float16 != stored.dtype and bool((numbers.isinf() & stored.isfinite()).any()):
            raise GGUFError(f"{name} of {self.path} holds numbers beyond fp16 (65504); load it in bf16 or fp32")
        return numbers


def _read(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("GGUF files are read with the `gguf` package: pip install 'fusion_compiler[gguf]'") from error
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    try:
        # copy on write: the pages are shared with every reader, and nothing can reach the file
        reader = GGUFReader(path, "c")
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        why = "has a tensor or a field of a type that gguf does not know" if "not a valid" in str(error) else (
            "is no GGUF file, or is truncated or damaged"
        )  # fmt: skip
        raise GGUFError(f"{path} ({path.stat().st_size} bytes) {why}: {error}") from error
    if reader.byte_order != "I":
        raise GGUFError(f"{path} was written on a machine of the other byte order; convert it with gguf-convert-endian")
    return reader


def _in_order(rows: Tensor, heads: int) -> Tensor:
    """rows [N, …] with the two halves of each head, interleaved in the file, one after the other again."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).flatten(0, 2) if heads else rows
