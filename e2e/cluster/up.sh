#!/usr/bin/env bash
# up.sh [DRIVER]: a Kubernetes cluster to try and test with; `down.sh` ends it. Run again, it keeps what is there.
#
#   kind      (default) two nodes in containers. Where no container engine answers, one is started; where the published node
#             image can't be pulled, it is built from Debian packages and Go modules (once; it stays in the cache).
#   api       etcd and kube-apiserver alone, as two processes: no pods, but ready in seconds. For trying controllers.
#   host      one node on this machine itself: processes, no container engine. Root on Debian 12; for a quick inner loop.
#   existing  the cluster that KUBECONFIG points at; nothing is started or ended.
#
# The kubeconfig is .run/cluster/kubeconfig unless KUBECONFIG says another file. .run/cluster/env, to be sourced, says how to
# reach things from this machine.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
alone "$@"
driver="${1:-kind}"
driver_script="$CLUSTER_DIR/drivers/$driver.sh"
[ -e "$driver_script" ] || fail "no driver '$driver'; there are: $(cd "$CLUSTER_DIR/drivers" && echo *.sh | sed 's/\.sh//g')"

mkdir -p "$STATE" "$CACHE"
if [ -e "$STATE/driver" ] && [ "$(cat "$STATE/driver")" != "$driver" ]; then
    fail "a cluster of driver '$(cat "$STATE/driver")' is up; end it first: e2e/cluster/down.sh"
fi
echo "$driver" >"$STATE/driver"
# Whoever brings it up by hand wants to find it again; run.sh says by KEEP what it wants.
[ -z "${KEEP-1}" ] || touch "$STATE/keep"
# shellcheck source=/dev/null
. "$driver_script"
cluster_up
{
    echo "export KUBECONFIG=$KUBECONFIG"
    [ -z "${DOCKER_HOST:-}" ] || echo "export DOCKER_HOST=$DOCKER_HOST"
    echo "export PATH=$BIN:\$PATH"
    cluster_addresses
} >"$STATE/env"
step "cluster is up; in your shell: source $STATE/env"
