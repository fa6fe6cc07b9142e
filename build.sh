#!/bin/sh
# Build the patched wheel: ./build.sh [--release v0.5.15.post1]
exec python3 "$(dirname "$0")/tools/build.py" "$@"
