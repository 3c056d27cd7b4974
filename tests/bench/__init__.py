"""Speed and memory, measured: ``python -m tests.bench``."""

from s2seg.allocator import keep_freed_memory

keep_freed_memory()  # as the command line does, before NumPy or torch start a thread; each process imports this first
