"""The native library: found, fitting, one pool of threads, safe in forked children."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch

from regard.contract.errors import OptionError, Unsupported
from regard.engines import native
from regard.engines.native.abi import open_library, version

built = pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}")

RUN = """
import torch
from regard.engines.native import block_sparse
from regard.patterns import Causal
def run(threads=None):
    if threads: torch.set_num_threads(threads)
    torch.manual_seed(0)
    q = torch.randn(1, 3, 200, 32)
    out, lse = block_sparse.forward(q, q, q, Causal().layout(200, 200))
    return out, block_sparse.backward(q, None, q, q, q, out, lse, Causal().layout(200, 200))[0]
"""


def script(body: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", RUN + textwrap.dedent(body)], capture_output=True, text=True, timeout=120,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_where_there_is_a_compiler_the_library_was_built():
    if os.environ.get("REGARD_NATIVE") == "require":
        assert native.missing() is None


@built
def test_the_openmp_runtime_is_torchs_and_the_only_one():
    text = script("""
        run(2)
        maps = open("/proc/self/maps").read().split()
        runtimes = {p for p in maps if ".so" in p and any(x in p.rpartition("/")[2] for x in ("gomp", "iomp", "libomp"))}
        import threading, os
        print(len(runtimes), any("torch" in p for p in runtimes), len(os.listdir("/proc/self/task")))
    """)
    assert text.split()[:2] == ["1", "True"]


@built
def test_the_library_does_not_link_an_openmp_runtime():
    tool = shutil.which("readelf")
    if tool is None:
        pytest.skip("no readelf")
    needed = subprocess.run([tool, "-d", native._path()], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in needed and "omp" not in needed


@built
def test_the_team_follows_torch():
    text = script("""
        import os
        torch.set_num_threads(1)
        run()
        before = len(os.listdir("/proc/self/task"))
        run(2)
        print(before, len(os.listdir("/proc/self/task")))
    """)
    before, after = map(int, text.split())
    assert after == before + 1


@built
def test_a_forked_child_uses_one_thread_and_the_same_bits():
    text = script("""
        import os
        wanted = run(2)
        child = os.fork()
        if child == 0:
            found = run(2)
            os._exit(0 if all(map(torch.equal, wanted, found)) else 1)
        print(os.waitpid(child, 0)[1])
    """)
    assert text.split() == ["0"]


@built
def test_import_opens_nothing():
    text = script("""
        from regard.engines import native
        print(native._library is None, "regard_native" in open("/proc/self/maps").read())
    """)
    assert text.split() == ["True", "False"]


@built
def test_a_stale_library_is_refused_with_its_number(tmp_path, monkeypatch):
    path = library(tmp_path, "int regard_abi() { return 7; }")
    with pytest.raises(OSError, match=rf"its interface is 7, not {version()}"):
        open_library(path)
    monkeypatch.setattr(native, "_reason", None)
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_path", lambda: path)
    assert "another version of regard" in str(native.missing())
    with pytest.raises(Unsupported, match="another version of regard"):
        native.library()


def test_a_foreign_library_is_refused(tmp_path):
    with pytest.raises(OSError, match="no regard_abi"):
        open_library(library(tmp_path, "int something_else() { return 1; }"))


def test_a_file_that_is_no_library_is_refused(tmp_path):
    (tmp_path / "x.so").write_bytes(b"not a library")
    with pytest.raises(OSError, match=r"x\.so"):
        open_library(str(tmp_path / "x.so"))


def test_without_the_library_there_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_reason", None)
    monkeypatch.setattr(native, "files", lambda _: tmp_path)
    assert "without a C++ compiler" in str(native.missing())
    with pytest.raises(Unsupported, match=r"no native kernels: .*compiler"):
        native.isas()


@built
def test_instruction_sets():
    assert native.isas()[0] == "portable"
    with pytest.raises(OptionError, match="portable, avx2"):
        native.isa_code("mmx")
    rate = native.fma_rate("portable", torch.float32, 0.01)
    assert rate > 1e8
    assert native.fma_rate(None, torch.float32, 0.05) >= rate


def library(folder, text: str) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    (folder / "x.c").write_text(text)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(folder / "x.so"), str(folder / "x.c")], check=True)
    return str(folder / "x.so")
