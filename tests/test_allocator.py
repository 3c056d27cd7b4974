from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from s2seg.allocator import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_large_buffers_are_reused_without_page_faults() -> None:
    code = (
        "import resource, sys, numpy as np\n"
        "if sys.argv[1] == 'keep':\n"
        "    from s2seg.allocator import keep_freed_memory\n"
        "    assert keep_freed_memory()\n"
        "def faults():\n"
        "    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(20): np.ones(2**23)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start\n"
        "faults(); print(faults())\n"
    )
    plain, kept = (
        int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout)
        for how in ("plain", "keep")
    )
    assert kept < plain / 10
    assert keep_freed_memory() is keep_freed_memory()
