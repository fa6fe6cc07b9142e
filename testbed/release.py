"""The release under test: UPSTREAM in the environment, as `make` sets it."""

from __future__ import annotations

import os
import platform
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
with (ROOT / "pins.toml").open("rb") as file:
    PINS = tomllib.load(file)
UPSTREAM: str = os.environ.get("UPSTREAM") or PINS["default"]
if UPSTREAM not in PINS["releases"]:
    sys.exit(f"UPSTREAM={UPSTREAM} is no release of pins.toml: {', '.join(PINS['releases'])}")
PIN = PINS["releases"][UPSTREAM]
VERSION: str = PIN["version"]
LOCAL_VERSION = f"{VERSION}+tokenids.{PIN['revision']}"
# (major, minor, patch), to tell what a release has.
NUMBER = tuple(int(part) for part in re.findall(r"\d+", VERSION)[:3])
STOCK = ROOT / "build" / f"stock-{UPSTREAM}"
_PYTHON = f"-cp{sys.version_info.major}{sys.version_info.minor}-"
# The stock wheel for this Python and machine, and ours.
[STOCK_WHEEL] = [
    file
    for file in PIN["wheels"]
    if "-py3-none-any" in file or (_PYTHON in file and platform.machine() in file)
]
WHEEL = STOCK_WHEEL.replace(f"-{VERSION}-", f"-{LOCAL_VERSION}-", 1)
# The patches of the release, to tell what its series has.
SERIES = (ROOT / "patches" / UPSTREAM / "series").read_text()
