"""Which pixels train, which validate, which test: by place, never by random chips."""

from __future__ import annotations

PARTS = ("train", "validation", "test")
"""Parts of a split, in the order of their codes: the first is 1; 0 is no part."""
