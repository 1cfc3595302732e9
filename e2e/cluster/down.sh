#!/usr/bin/env bash
# down.sh: ends the cluster that up.sh started, and an engine that it started for it. What is built stays in the cache.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
[ -e "$STATE/driver" ] || exit 0
alone "$@"
# shellcheck source=/dev/null
. "$CLUSTER_DIR/drivers/$(cat "$STATE/driver").sh"
cluster_down
rm -rf "$STATE"
step "cluster is gone"
