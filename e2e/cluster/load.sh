#!/usr/bin/env bash
# load.sh ARCHIVE…: gives the nodes of the cluster that is up the images of docker-archives.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
[ -e "$STATE/driver" ] || fail "no cluster is up; start one: e2e/cluster/up.sh"
# shellcheck source=/dev/null
. "$CLUSTER_DIR/drivers/$(cat "$STATE/driver").sh"
cluster_load "$@"
