#!/usr/bin/env bash
# run.sh: the tests on a real Kubernetes, from nothing to nothing. By environment:
#   SUITE   ci (what CI runs) or all
#   DRIVER  kind (default), host or existing; see up.sh
#   E2E_REGISTRY  for DRIVER=existing: where images are pushed to (by docker) and its nodes pull them from
#   KEEP=1  leaves the cluster up; the next run goes on with it (and leaves it up too)
#   ONLY    only tests whose name contains this
#   STATIC=1  the second image is the static release build, as it is when the whole SUITE=all runs; else it is the first one
#           with another label, which costs no compilation
#   REQUIRE_E2E=1  fails where the tests can't run, instead of skipping them
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
suite="${SUITE:-all}"
driver="${DRIVER:-kind}"
case $suite in ci | all) ;; *) fail "SUITE is ci or all, not '$suite'" ;; esac

if [ "$driver" = kind ] && ! timeout 10 docker info >/dev/null 2>&1 && ! { [ "$(uname -s)" = Linux ] && [ "$(id -u)" = 0 ]; }; then
    why="no container engine answers (docker info), and starting one needs root on Linux"
    [ "${REQUIRE_E2E:-}" != 1 ] || fail "the tests on Kubernetes can't run: $why"
    echo "SKIPPED: the tests on Kubernetes: $why." >&2
    exit 0
fi

# Images are loaded onto the nodes of our clusters; nodes of somebody else's pull them, and keep what they pulled under a tag.
registry=localhost tag=e2e
if [ "$driver" = existing ]; then
    registry="${E2E_REGISTRY:-}" tag="e2e-$(date +%s)"
    [ -n "$registry" ] || fail "DRIVER=existing needs E2E_REGISTRY: a registry that docker can push to and the nodes pull from"
else
    unset E2E_REGISTRY
fi
image="$registry/imcluster:$tag"

# A cluster that somebody wants to stay does so; one that a killed run left behind doesn't.
[ ! -e "$STATE/keep" ] || KEEP=1
export KEEP="${KEEP:-}"

# Whatever happens, a cluster of ours is gone at the end, and what a failure leaves behind is read first.
finish() {
    local status=$?
    trap - EXIT INT TERM
    if [ "$status" != 0 ] && [ -e "$STATE/driver" ]; then
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
# Two images: a roll-out from one to the other replaces every pod.
images/build.sh --dev "$images/imcluster.tar" "$image"
if [ "${STATIC:-}" = 1 ] || { [ "$suite" = all ] && [ -z "${ONLY:-}" ]; }; then
    images/build.sh --static "$images/imcluster-other.tar" "$image-other"
else
    LABEL=e2e=other images/build.sh --dev "$images/imcluster-other.tar" "$image-other"
fi
scenarios() { cargo test --workspace --test kubernetes -- ${ONLY:+"$ONLY"} "$@"; }
# Read to its end: whoever writes into a closed pipe fails.
scenarios --list | grep ': test$' >/dev/null || fail "no scenario has '${ONLY:-}' in its name"
# The chart of this very build, whatever is edited while the tests run.
rm -rf "$STATE/chart"
cp -r charts/imcluster "$STATE/chart"

"$CLUSTER_DIR/up.sh" "$driver"
# shellcheck source=/dev/null
. "$STATE/env"
step "images into the cluster"
mapfile -t dependencies < <("$CLUSTER_DIR/images.sh")
"$CLUSTER_DIR/load.sh" "$images"/*.tar "${dependencies[@]}"
# In a cluster that was kept, the operator of the last run has an image of the same name, and scenarios that failed left theirs.
kubectl --namespace imcluster-system delete pods --selector app.kubernetes.io/instance=imcluster >/dev/null
kubectl delete namespaces --selector imcluster.dev/e2e=true --timeout=300s >/dev/null
manifests "$CLUSTER_DIR"/manifests/*.yaml | kubectl apply --filename - >/dev/null
kubectl --namespace e2e-dependencies rollout status statefulset/prometheus --timeout=120s >/dev/null
kubectl --namespace e2e-dependencies rollout status statefulset/postgres --timeout=120s >/dev/null
"$CLUSTER_DIR/check.sh"

step "suite '$suite'"
export IM_E2E_SUITE="$suite" IM_E2E_IMAGE="$image" IM_E2E_IMAGE_OTHER="$image-other"
export IM_E2E_CHART="$STATE/chart"
export IM_E2E_PROMETHEUS=http://prometheus.e2e-dependencies:9090
export IM_E2E_POSTGRES=postgres://im:im@postgres.e2e-dependencies:5432/im IM_E2E_POSTGRES_NODE_PORT=31432
HELM="$(command -v helm)"
export HELM
if [ "$driver" != existing ] && [ "$(uname -s)" = Linux ] && [ "$(id -u)" = 0 ]; then export IM_E2E_NODES_HERE=1; fi
# One after the other: they share two cores and one cluster.
status=0
scenarios --nocapture --test-threads=1 2>&1 | tee "$STATE/scenarios.log" || status=$?
step "what ran, and what did not"
grep -E '^[a-z_]+: (passed|FAILED) after |SKIPPED' "$STATE/scenarios.log" || true
[ "$status" != 0 ] || grep -q ': passed after ' "$STATE/scenarios.log" || fail "no scenario ran"
exit "$status"
