"""How many threads a network takes, so that the libraries of a process, and processes of a machine, share the cores."""

from __future__ import annotations

import os
import sys
from functools import cache

import dask.config
from dask.system import CPU_COUNT

THREADS = "s2seg.threads"
"""dask's setting for it, which goes to a cluster's workers with dask's others."""


def threads_of_process() -> int | None:
    """Return how many threads a network takes in this process; None for what its library takes by itself.

    That is, the first of these that there is: dask's setting ``s2seg.threads`` (``DASK_S2SEG__THREADS`` in the
    environment); on a dask worker its own number of threads, which run one network at a time, but no more than there
    are CPUs; ``OMP_NUM_THREADS``, which dask sets to 1 for its workers and which off them is a person's wish; the CPUs
    that the process may use, where they are fewer than the machine's. Where nothing narrows it the libraries know
    better, as they tell cores from hyper-threads.
    """
    if told := dask.config.get(THREADS, None):
        return int(told)
    if threads := _threads_of_worker():
        return min(threads, CPU_COUNT)
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # OpenMP takes a list, for nested loops
    if wanted.isdecimal() and int(wanted):
        return int(wanted)
    return CPU_COUNT if (os.cpu_count() or 1) > CPU_COUNT else None


@cache
def set_torch_threads() -> None:
    """Give torch its threads, once: they are the process's, not a session's."""
    import torch

    if threads := threads_of_process():
        torch.set_num_threads(threads)


def _threads_of_worker() -> int | None:
    """The number of threads of the dask worker that runs this task, if one does."""
    distributed = sys.modules.get("distributed")  # a worker has loaded it
    if distributed is None:
        return None
    try:
        return int(distributed.get_worker().state.nthreads)
    except ValueError:
        return None
