"""Put the patched wheel over the SGLang of an environment.

Refuses if the SGLang there is of another release, or is not what its wheel contained.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from releases import ROOT, Release, ToolError, load_release, run, say

# Runs in the other environment: says which SGLang is there and what was changed in it.
INSPECT = """
import base64, hashlib, importlib.metadata as metadata, json, platform, sys
try:
    found = metadata.distribution("sglang")
except metadata.PackageNotFoundError:
    sys.exit(print(json.dumps({"version": None, "python": None, "machine": None})))
def is_changed(file):
    if file.hash is None or file.hash.mode != "sha256":
        return False
    try:
        digest = hashlib.sha256(file.locate().read_bytes()).digest()
    except OSError:
        return True
    return base64.urlsafe_b64encode(digest).decode().rstrip("=") != file.hash.value
url = json.loads(found.read_text("direct_url.json") or "{}")
print(json.dumps({
    "version": found.version,
    "python": "%d.%d" % sys.version_info[:2],
    "machine": platform.machine(),
    "editable": bool(url.get("dir_info", {}).get("editable")),
    "changed": [str(file) for file in found.files or [] if is_changed(file)],
}))
"""


def wheel_for(release: Release, python: str) -> Path:
    """Return the built wheel that may replace what is there.

    Raises:
        ToolError: If there is none or it may not.
    """
    found = json.loads(run([python, "-c", INSPECT]))
    if found["version"] is None:
        raise ToolError(f"there is no sglang for {python} to replace: install {release.version}")
    if found["version"].partition("+")[0] != release.version:
        raise ToolError(
            f"the sglang of {python} is {found['version']}, but the wheel is for {release.version}"
        )
    if found["editable"]:
        raise ToolError(f"the sglang of {python} is an editable install of a source tree")
    if found["changed"]:
        raise ToolError(
            f"the sglang of {python} has local changes, in {len(found['changed'])} files: "
            f"{found['changed'][0]}"
        )
    wheel = release.built_wheel(found["python"], found["machine"])
    if not wheel.exists():
        raise ToolError(f"there is no {wheel.relative_to(ROOT)}: run `make wheel`")
    return wheel


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--release", help="a release of pins.toml (default: its default)")
    parser.add_argument("--python", default="python", help="the environment's Python")
    args = parser.parse_args()
    try:
        release = load_release(args.release)
        wheel = wheel_for(release, args.python)
        say(f"installing {wheel.name}")
        command = [args.python, "-m", "pip", "install", "--no-deps", "--force-reinstall"]
        status = subprocess.run([*command, str(wheel)]).returncode
    except ToolError as e:
        print(f"install: {e}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
