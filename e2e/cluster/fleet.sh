#!/usr/bin/env bash
# fleet.sh [CLUSTERS [MEMBERS]]: what the operator costs with 200 ImClusters of 50 simulated members each on a real API server, at rest,
# and that it then writes nothing. The API server is one of its own, in memory-backed etcd; it ends with this.
set -euo pipefail
cd "$(dirname "$0")/../.."
# An API server beside a cluster that may be up, with the ports and certificates of its own.
export STATE="$PWD/.run/fleet" KUBECONFIG="$PWD/.run/fleet/kubeconfig"
# shellcheck source=common.sh
. e2e/cluster/common.sh
trap 'e2e/cluster/down.sh' EXIT
e2e/cluster/up.sh api
cargo build --workspace --bins --quiet ${PROFILE:+--profile "$PROFILE"}
export IM_FLEET_CLUSTERS="${1:-200}" IM_FLEET_MEMBERS="${2:-50}"
IM_FLEET_OPERATOR="$PWD/${CARGO_TARGET_DIR:-target}/${PROFILE:-debug}/imcluster" \
    cargo test --workspace --test fleet ${PROFILE:+--profile "$PROFILE"} -- --nocapture
