"""The release under test: UPSTREAM in the environment, as `make` sets it."""

from __future__ import annotations

import os
import re
import sys

from tools.common import BUILD, ROOT, ToolError
from tools.releases import load_release, read_pins

PINS = read_pins()
try:
    RELEASE = load_release(os.environ.get("UPSTREAM"))
except ToolError as e:
    sys.exit(f"error: UPSTREAM: {e}")
UPSTREAM = RELEASE.name
VERSION = RELEASE.version
LOCAL_VERSION = RELEASE.local_version
# (major, minor, patch), to tell what a release has.
NUMBER = tuple(int(part) for part in re.findall(r"\d+", VERSION)[:3])
STOCK = BUILD / f"stock-{UPSTREAM}"
# The stock wheel for this Python and machine, and ours.
STOCK_WHEEL = RELEASE.stock_wheel().file
WHEEL = RELEASE.built_wheel().name
# The patches of the release, to tell what its series has.
SERIES = (ROOT / "patches" / UPSTREAM / "series").read_text()
