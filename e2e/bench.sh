#!/usr/bin/env bash
# Measures the release build beside its peers, in one run, and prints one table; also written to target/bench.json.
# Arguments are handed on: `e2e/bench.sh --only steady,moves`, `--help`.
set -euo pipefail
# Peers that are built from their modules (cluster/tools.sh nats-server mochi) are found here.
PATH="${XDG_CACHE_HOME:-$HOME/.cache}/imcluster/bin:$PATH"
# Thousands of connections need as many descriptors; shells often allow 1,024 at first.
ulimit -n "$(ulimit -Hn)" 2>/dev/null || true
target="${CARGO_TARGET_DIR:-$(cd "$(dirname "$0")/.." && pwd)/target}"
exec "$target/release/imbench" --programs "$target/release" --json "$target/bench.json" "$@"
