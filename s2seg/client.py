"""The cluster that dask would use now, if any."""

from __future__ import annotations

from typing import Any

from dask.base import get_scheduler


def current_client() -> Any | None:
    """Return the distributed client that computes what is computed now; None where this process does it by itself."""
    # a client hands dask one of its methods; dask's own schedulers are functions
    owner = getattr(get_scheduler(), "__self__", None)
    return owner if hasattr(owner, "scheduler_info") else None
