"""The house rules of docs/architecture.md: who may import whom, how long a file may be, and what it may name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400

# Longer than MAX_LINES, and why that is better than splitting.
LONG: dict[str, str] = {
    "tests/test_attention.py": "every spelling, grouping, mask and refusal of one pattern",
    "tests/attention_in_the_wild.py": "a list: one short function for each way of writing attention",
}
# The only modules of the core that know which patterns and lowerings exist.
WIRING = {f"fusion_compiler.{m}" for m in ("backend", "capture", "cli", "registry")}
# What a pattern may be written with: the vocabulary, and the recognisers of what a plain function cannot express.
VOCABULARY = {
    f"fusion_compiler.{m}"
    for m in (
        *("activation_linear", "algebra", "attention", "counters", "fused", "linear_epilogue", "match", "pattern"),
        *("quantised", "rope", "rope_cache", "semantics", "siblings"),
    )
}
# Imported inside functions only, so that a machine without them can still load the compiler.
LAZY = {
    "triton",
    "torch_npu",
    "torch_mlu",
    "torch_mlu_ops",
    "aiter",
    "flash_attn",
    "flash_attn_interface",
    "xformers",
    "tensorrt",
    "transformers",
}
# Private interfaces of torch have one home each: a module of torch_private, or one named here with the reason.
PRIVATE_HOMES = {"fusion_compiler.decompositions": "is the home of Inductor's table of decompositions"}
VAGUE = {"utils", "util", "helpers", "common", "misc"}


@dataclass(frozen=True)
class Import:
    """`module` imports `target`, at the top of the file unless `lazy`; `typing` if type checkers alone see it."""

    path: Path
    module: str
    target: str
    line: int
    lazy: bool
    typing: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.target}"


def module_of(path: Path) -> str:
    """The name that a source file is imported by: `patterns/x.py` is fusion_compiler.patterns.x."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "fusion_compiler":
        parts.insert(0, "fusion_compiler")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def imports_of(path: Path) -> Iterator[Import]:
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, module, alias.name, node.lineno, lazy, typing)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from . import x` may name a module or something in one: the longer name, if it is a file
                longer = f"{base}.{alias.name}"
                yield Import(path, module, longer if longer in MODULES else base, node.lineno, lazy, typing)
        else:
            inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            checking = typing or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inside, checking)

    yield from visit(ast.parse(path.read_text()), False, False)


SOURCES = sources("fusion_compiler", "patterns", "lowering")
MODULES = {module_of(p) for p in SOURCES}
IMPORTS = [found for path in SOURCES for found in imports_of(path)]


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def offenders(*found: Import) -> str:
    return "\n".join(map(str, found))


def test_the_reader_of_imports_sees_what_it_should() -> None:
    assert len(SOURCES) > 20 and len(IMPORTS) > 100
    assert any(i.module == "fusion_compiler.fused.matmul" and i.target == "fusion_compiler.algebra" for i in IMPORTS)
    assert any(i.lazy and i.target == "triton" for i in IMPORTS)
    assert any(i.typing for i in IMPORTS)


def test_core_knows_no_pattern_and_no_lowering() -> None:
    wrong = [
        i
        for i in IMPORTS
        if (within(i.target, "fusion_compiler.patterns") or within(i.target, "fusion_compiler.lowering"))
        and i.path.is_relative_to(ROOT / "fusion_compiler")
        and i.module not in WIRING
    ]
    assert not wrong, offenders(*wrong)


def test_patterns_use_the_vocabulary_alone() -> None:
    wrong = [
        i
        for i in IMPORTS
        if within(i.module, "fusion_compiler.patterns")
        and within(i.target, "fusion_compiler")
        and i.target not in VOCABULARY
        # the package itself lists them, and is listed
        and not (i.module == "fusion_compiler.patterns" and within(i.target, "fusion_compiler.patterns"))
        and not (i.module == "fusion_compiler.patterns" and i.target == "fusion_compiler.registry")
    ]
    assert not wrong, offenders(*wrong)


def test_lowerings_import_no_pattern_and_no_other_target() -> None:
    def target_of(module: str) -> str:
        return ".".join(module.split(".")[:3])  # fusion_compiler.lowering.<target>

    lowerings = [i for i in IMPORTS if within(i.module, "fusion_compiler.lowering")]
    wrong = [i for i in lowerings if within(i.target, "fusion_compiler.patterns")]
    wrong += [
        i
        for i in lowerings
        if i.module != "fusion_compiler.lowering"  # the package itself lists them
        and i.target.startswith("fusion_compiler.lowering.")
        and target_of(i.module) != target_of(i.target)
    ]
    assert not wrong, offenders(*wrong)


def test_triton_and_vendor_libraries_are_imported_inside_functions() -> None:
    wrong = [i for i in IMPORTS if i.target.split(".")[0] in LAZY and not i.lazy and not i.typing]
    assert not wrong, offenders(*wrong)


def test_private_interfaces_of_torch_have_one_home() -> None:
    wrong = [
        i
        for i in IMPORTS
        if re.match(r"(torch\._|functorch)", i.target)
        and not within(i.module, "fusion_compiler.torch_private")
        and i.module not in PRIVATE_HOMES
    ]
    assert not wrong, offenders(*wrong)


@pytest.mark.parametrize("path", sources("fusion_compiler", "patterns", "lowering", "tests", "benchmarks"), ids=str)
def test_files_are_short_and_named_for_what_they_hold(path: Path) -> None:
    assert path.stem not in VAGUE, f"{path.name} says nothing of what it holds"
    name, lines = str(path.relative_to(ROOT)), len(path.read_text().splitlines())
    assert lines <= MAX_LINES or name in LONG, f"{name} has {lines} lines: split it, or say in LONG why not"


def test_no_exemption_has_outlived_its_reason() -> None:
    assert all(len((ROOT / name).read_text().splitlines()) > MAX_LINES for name in LONG)
    assert PRIVATE_HOMES.keys() <= MODULES


def test_every_module_says_what_it_is_for() -> None:
    silent = [str(p.relative_to(ROOT)) for p in SOURCES if not ast.get_docstring(ast.parse(p.read_text()))]
    assert not silent


def test_no_file_names_a_path_of_one_machine() -> None:
    folders = "|".join(("root", "home", "work", "Users", "opt", "mnt"))
    absolute = re.compile(rf"(?<![\w.:/~-])/(?:{folders})/\w")
    # .git is a file in a linked worktree, and names the repository
    texts = [p for p in ROOT.glob("*") if p.is_file() and p.suffix in ("", ".md", ".toml", ".txt") and p.name != ".git"]
    for folder in ("fusion_compiler", "patterns", "lowering", "tests", "benchmarks", "docs", ".ci"):
        texts += [p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    found = [
        f"{p.relative_to(ROOT)}: {line.strip()[:100]}"
        for p in texts
        if p.suffix in ("", ".md", ".toml", ".txt", ".py", ".json", ".html")
        for line in p.read_text(errors="replace").splitlines()
        if absolute.search(line)
    ]
    assert not found, "\n".join(found)
