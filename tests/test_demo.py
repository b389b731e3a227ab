"""The main job runs on a CPU from a plain checkout, in small, and its errors are those of eager."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(module: str, *flags: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", module, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_demo(phase: str, demo_output: str) -> None:
    part = demo_output.partition(f"== {phase}")[2].partition("\n== ")[0]
    assert "fusion_compiler for cpu" in part
    rows = {m[1]: m for m in re.finditer(r"^\| (eager|inductor|ours) \| ([\d.]+) \| \S+ \| ([\d.e+-]+) \|", part, re.M)}
    assert set(rows) == {"eager", "inductor", "ours"}
    errors = {name: float(row[3]) for name, row in rows.items()}
    assert 0 < errors["ours"] <= 1.5 * errors["eager"] < 1e-5


@pytest.fixture(scope="module")
def demo_output() -> str:
    return run("benchmarks.demo", "--tiny", "--device", "cpu", "--rounds", "2")


@pytest.mark.parametrize("table", ["gated_mlp", "attention", "llama", "rows", "linears"])
def test_benchmarks_print_a_table_and_write_their_figures(table: str, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    only = {"gated_mlp": "M=1", "attention": "H4/2", "llama": "decode", "rows": "softmax", "linears": "gelu"}[table]
    out = run(f"benchmarks.{table}", "--tiny", "--only", only, "--device", "cpu", "--rounds", "2", "--json", str(path))
    assert out.startswith("| ") and "ours" in out and "failed" not in out
    stored = json.loads(path.read_text())
    assert stored["rows"] and stored["device"]["type"] == "cpu" and stored["versions"]["torch"]
    assert stored["date"] and "commit" in stored and table in stored["command"]


def test_attention_is_prepared_in_other_processes_and_merged(tmp_path: Path) -> None:
    part, old, merged = tmp_path / "part.json", tmp_path / "old.json", tmp_path / "all.json"
    run("benchmarks.attention", "--tiny", "--device", "cpu", "--jobs", "2", "--only", "softcap", "--json", str(part))
    (row,) = json.loads(part.read_text())["rows"]
    assert row["name"].endswith("softcap") and row["seconds"]["ours"] > 0
    other = {**row, "name": row["name"].replace("softcap", "plain")}
    old.write_text(json.dumps({"date": "before", "rows": [{**row, "seconds": {}}, other]}))
    out = run("benchmarks.attention", "--tiny", "--merge", str(old), str(part), "--json", str(merged))
    rows = json.loads(merged.read_text())["rows"]
    assert [(r["name"], r["part"]) for r in rows] == [(other["name"], 0), (row["name"], 1)]
    assert rows[1]["seconds"] == row["seconds"] and all(r["name"] in out for r in rows)
    # what was put together before keeps telling its parts
    run("benchmarks.attention", "--tiny", "--merge", str(old), str(merged), "--json", str(merged))
    again = json.loads(merged.read_text())
    assert [again["parts"][r["part"]].get("date") for r in again["rows"]] == [
        "before",
        json.loads(part.read_text())["date"],
    ]


def test_the_sweep_of_the_matmul_family_merges_parts_and_tells_regret(tmp_path: Path) -> None:
    def row(m: int, ours: float, kernel: float) -> dict[str, Any]:
        return {
            "name": f"1B M={m}", "shape": "1B", "m": m, "dtype": "bfloat16", "floor": 15e-6, "predicted": 20e-6,
            "verdict": "kept", "resources": {"registers": 168, "spills": 0, "shared": 98304},
            "seconds": {"inductor": 24e-6, "ours": ours}, "speedup": {},
            "kernels": [{"plan": "tile", "seconds": kernel}, {"plan": "refused", "seconds": 0.0}],
        }  # fmt: skip

    parts = [tmp_path / "a.json", tmp_path / "b.json"]
    for part, rows in zip(parts, ([row(16, 24e-6, 20e-6)], [row(64, 20e-6, 20.5e-6)]), strict=True):
        part.write_text(json.dumps({"date": part.name, "rows": rows}))
    merged = tmp_path / "all.json"
    out = run("benchmarks.matmul_family", "--merge", *map(str, parts), "--json", str(merged))
    assert "| 1.200 | kept | 168, 0, 98304 |" in out and "regret ≤ 1.05 in 1 of 2 points" in out
    assert [r["m"] for r in json.loads(merged.read_text())["rows"]] == [16, 64]
