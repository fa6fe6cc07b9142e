#!/bin/sh
# Build the patched wheel: ./build.sh [--release v0.5.15.post1]
cd "$(dirname "$0")" && exec python3 -m tools build "$@"
