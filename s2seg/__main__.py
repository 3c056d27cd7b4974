"""``python -m s2seg`` is ``s2seg``."""

import sys

from s2seg.cli import main

sys.exit(main())
