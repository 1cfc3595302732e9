#!/usr/bin/env bash
# check.sh: is the cluster itself what the tests build on? Everything that they need from it is tried once: name service, a
# service's address, a volume, a node port from this machine, Prometheus finding a pod by its annotations, PostgreSQL.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
# shellcheck source=/dev/null
. "$STATE/env"
namespace=e2e-check
trap 'kubectl delete namespace $namespace --ignore-not-found --wait=false >/dev/null' EXIT

step "check: pods, names, services"
kubectl create namespace $namespace --dry-run=client --output yaml | kubectl apply --filename - >/dev/null
manifests "$CLUSTER_DIR"/manifests/check/*.yaml | kubectl --namespace $namespace apply --filename - >/dev/null
kubectl --namespace $namespace rollout status deployment/answer --timeout=90s >/dev/null || fail "pods don't become ready"

# `inside COMMAND…`: its output in a pod of the cluster.
inside() { kubectl --namespace $namespace exec deployment/answer -- "$@"; }
answers_hello() { [ "$(inside timeout 5 wget -qO- "http://answer.$namespace.svc.cluster.local:8080/")" = hello ]; }
wait_for 30 answers_hello || fail "a pod can't reach a service by its name"

step "check: PostgreSQL"
ready() { kubectl --namespace e2e-dependencies exec postgres-0 -- sh -c "PGPASSWORD=im psql --host=$1 --username=im --tuples-only --command='select 1'"; }
wait_for 30 ready postgres.e2e-dependencies || fail "PostgreSQL doesn't answer at postgres.e2e-dependencies:5432"

step "check: Prometheus, through its node port"
address="${IM_NODE_PORT_31090:-$IM_NODE:31090}"
sees_pod() {
    curl --silent --fail --max-time 5 --get "http://$address/api/v1/query" --data-urlencode "query=check_answer{namespace=\"$namespace\"}" |
        grep -q '"pod":"answer-.*"42"'
}
wait_for 30 sees_pod || fail "Prometheus at http://$address doesn't see the pod that asks to be scraped"
step "check: all is well"
