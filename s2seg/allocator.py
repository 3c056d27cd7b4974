"""Memory that is used again and again should not go back to the kernel in between."""

from __future__ import annotations

import ctypes
import functools
import os
import platform

# glibc's <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1

WORKER_ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": str(_NEVER),
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_ARENA_MAX": "1",
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""The same for a process that is yet to start."""


@functools.cache
def keep_freed_memory() -> bool:
    """Make glibc reuse large buffers instead of handing them back to the kernel; return whether it did.

    A U-Net on a large window allocates and frees hundreds of megabytes per layer. By default each buffer goes back to
    the kernel and returns as untouched pages, one fault each, which costs as much as the arithmetic: windows of 1152 px
    ran at 1.1 to 1.6 Mpx/s with it and at 2.2 without (two cores, mobilenet_v2). One arena serves all threads, so that
    a buffer freed by one is there for the next.

    What is touched for the first time comes in huge pages where torch allocates it (2 MiB per fault, not 4 KiB), if
    torch has not allocated anything yet.

    It holds for the whole process, reaches only threads that start later, and does nothing where malloc is not glibc's.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch looks at its first allocation
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_ARENA_MAX, 1))
    done = [mallopt(option, value) for option, value in settings]
    return all(done)
