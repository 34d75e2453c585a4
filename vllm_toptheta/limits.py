"""What parts agree on that know nothing of each other. Imports nothing."""

from __future__ import annotations

import math

MAX_LOG_SCALE = math.log(1e6)  # of r: keeps sums over keys that are not read finite
