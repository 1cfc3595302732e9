#!/usr/bin/env bash
# run.sh: the tests on a real Kubernetes, from nothing to nothing. By environment:
#   SUITE   ci (what CI runs) or all
#   DRIVER  kind (default), host or existing; see up.sh
#   KEEP=1  leaves the cluster up; the next run goes on with it (and leaves it up too)
#   ONLY    only tests whose name contains this
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
suite="${SUITE:-all}"
driver="${DRIVER:-kind}"
case $suite in ci | all) ;; *) fail "SUITE is ci or all, not '$suite'" ;; esac

if [ "$driver" = kind ] && ! timeout 10 docker info >/dev/null 2>&1 && ! { [ "$(uname -s)" = Linux ] && [ "$(id -u)" = 0 ]; }; then
    echo "SKIPPED: the tests on Kubernetes. No container engine answers (docker info), and starting one needs root on Linux." >&2
    exit 0
fi

# A cluster that was up before stays up after.
[ ! -e "$STATE/env" ] || KEEP=1

# Whatever happens, a cluster of ours is gone at the end, and what a failure leaves behind is read first.
finish() {
    local status=$?
    trap - EXIT INT TERM
    if [ "$status" != 0 ] && [ -e "$STATE/env" ]; then
        "$CLUSTER_DIR/dump.sh" "$REPOSITORY/.run/cluster-dump" || true
    fi
    if [ "${KEEP:-}" = 1 ]; then
        step "the cluster stays up; source $STATE/env, end it with e2e/cluster/down.sh"
    else
        "$CLUSTER_DIR/down.sh" || status=1
    fi
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

step "programs and images"
cd "$REPOSITORY"
images="$STATE/images"
mkdir -p "$images"
# Two images of one build: a roll-out from one to the other replaces every pod.
images/build.sh --dev "$images/imcluster.tar" localhost/imcluster:e2e
LABEL=e2e=other images/build.sh --dev "$images/imcluster-other.tar" localhost/imcluster:e2e-other
# The chart of this very build, whatever is edited while the tests run.
rm -rf "$STATE/chart"
cp -r charts/imcluster "$STATE/chart"

"$CLUSTER_DIR/up.sh" "$driver"
# shellcheck source=/dev/null
. "$STATE/env"
step "images into the cluster"
mapfile -t dependencies < <("$CLUSTER_DIR/images.sh")
"$CLUSTER_DIR/load.sh" "$images"/*.tar "${dependencies[@]}"
# In a cluster that was kept, the operator of the last run has an image of the same name.
kubectl --namespace imcluster-system delete pods --all --ignore-not-found >/dev/null
kubectl apply --filename "$CLUSTER_DIR/manifests/namespace.yaml" >/dev/null
kubectl apply --filename "$CLUSTER_DIR/manifests/" >/dev/null
kubectl --namespace e2e-dependencies rollout status statefulset/prometheus --timeout=120s >/dev/null
kubectl --namespace e2e-dependencies rollout status statefulset/postgres --timeout=120s >/dev/null
"$CLUSTER_DIR/check.sh"

step "suite '$suite'"
export IM_E2E_SUITE="$suite" IM_E2E_IMAGE=localhost/imcluster:e2e IM_E2E_IMAGE_OTHER=localhost/imcluster:e2e-other
export IM_E2E_CHART="$STATE/chart"
export IM_E2E_PROMETHEUS=http://prometheus.e2e-dependencies:9090
export IM_E2E_POSTGRES=postgres://im:im@postgres.e2e-dependencies:5432/im IM_E2E_POSTGRES_NODE_PORT=31432
HELM="$(command -v helm)"
export HELM
# One after the other: they share two cores and one cluster.
cargo test --workspace --test kubernetes -- --nocapture --test-threads=1 ${ONLY:+"$ONLY"}
