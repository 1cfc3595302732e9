#!/usr/bin/env bash
# Measures the release build beside its peers, in one run, and prints one table; also written to target/bench.json.
# Arguments are handed on: `e2e/bench.sh --only steady,moves`, `--help`.
set -euo pipefail
target="${CARGO_TARGET_DIR:-$(cd "$(dirname "$0")/.." && pwd)/target}"
exec "$target/release/imbench" --programs "$target/release" --json "$target/bench.json" "$@"
