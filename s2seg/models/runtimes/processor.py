"""What torch finds this processor to have."""

from __future__ import annotations

from collections.abc import Mapping

import torch

_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""x86's two extensions with such arithmetic, then ARM's."""


def has_bfloat16() -> bool:
    """Whether this processor calculates in bfloat16; True where an older torch cannot tell.

    On one without, torch imitates it, and takes many times as long as in float32.
    """
    found: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    known = [bool(found[name]) for name in _BFLOAT16 if name in found]
    return any(known) or not known
