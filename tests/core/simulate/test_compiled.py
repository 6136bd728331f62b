"""What kernels rely on in numba beyond its documented options."""

import errno
import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from numba import njit
from numba.core import caching
from numba.core.errors import NumbaError

import dip_megatron
from dip_megatron.core.simulate import compiled as compilation
from dip_megatron.core.simulate.compiled import compiled, digest_of, inlined, trailing_zeros


@compiled
def lowest(words):
    count = 0
    for i in range(len(words)):
        count = count * 100 + trailing_zeros(words[i])
    return count


@inlined
def twice(numbers, i):
    numbers[i] *= 2
    return numbers[i], numbers[i] + 1


@compiled
def doubled(numbers):
    total = 0
    for i in range(len(numbers)):
        here, after = twice(numbers, i)
        total += here * after
    return total


def allocating(count):
    return np.zeros(count).sum()


def test_the_lowest_bit_of_a_word():
    assert lowest(np.array([1 << 3, (1 << 63) | (1 << 40), 1 << 63], dtype=np.uint64)) == 34063


def test_pieces_are_pasted_in():
    numbers = np.array([1, 2, 3])
    assert doubled(numbers) == 2 * 3 + 4 * 5 + 6 * 7
    assert numbers.tolist() == [2, 4, 6]


def test_kernels_count_no_references():
    """The switch for it has an underscore, so a numba without it must be noticed. What counts none can't allocate."""
    assert njit(allocating)(3) == 0.0
    with pytest.raises(NumbaError):
        compiled(allocating)(3)


KERNEL = """
from dip_megatron.core.simulate.compiled import compiled
@compiled
def one_more(x):
    return x + 1
"""


def hits(path):
    """How often a fresh process's call would find the kernel of ``path`` on disk."""
    spec = importlib.util.spec_from_file_location("kernel_of_a_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.one_more(2) == 3
    return sum(module.one_more.stats.cache_hits.values())


def test_a_kernel_is_compiled_again_once_pieces_of_other_files_have_changed(monkeypatch, tmp_path):
    path = tmp_path / "kernel.py"
    path.write_text(KERNEL)
    assert [hits(path), hits(path)] == [0, 1]
    monkeypatch.setattr(compilation, "KERNELS", "after an edit elsewhere")
    assert [hits(path), hits(path)] == [0, 1]


def test_a_kernel_that_cannot_be_kept_runs_all_the_same(monkeypatch, tmp_path, caplog):
    """On a full disk, and where no folder may be written to."""
    path = tmp_path / "kernel.py"
    path.write_text(KERNEL)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(caching.IndexDataCacheFile, "save", full)
        assert hits(path) == 0
    assert re.search(r"can't keep one_more once compiled in .*__pycache__ .*No space left", caplog.text)
    with monkeypatch.context() as patch:
        patch.setattr(caching.CacheImpl, "_locator_classes", [])
        assert hits(path) == 0
    assert "set NUMBA_CACHE_DIR to a folder that can be written" in caplog.text
    assert [hits(path), hits(path)] == [0, 1]


def test_every_file_with_a_piece_counts_and_no_other(tmp_path):
    package = tmp_path / "package"
    here = Path(dip_megatron.__file__).parent
    for folder in ("core", "schedulers"):
        shutil.copytree(here / folder, package / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with_kernels = {p.relative_to(here) for p in here.rglob("*.py") if "\n@compiled" in p.read_text()}
    assert {p.parts[0] for p in with_kernels} == {"core", "schedulers"}
    before = digest_of(package)
    assert before == compilation.KERNELS
    for name, counts in (("schedulers/dip/admission.py", True), ("core/bounds.py", True), ("core/plan.py", False)):
        text = (package / name).read_text()
        (package / name).write_text(text + "\n# edited\n")
        assert (digest_of(package) != before) is counts
        (package / name).write_text(text)
