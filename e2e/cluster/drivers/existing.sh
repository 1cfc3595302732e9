# Driver `existing`: somebody else's cluster, by KUBECONFIG. Images must be where its nodes can pull them.
# shellcheck shell=bash
cluster_up() {
    command -v kubectl >/dev/null || "$CLUSTER_DIR/tools.sh" kubernetes
    kubectl get --raw /readyz >/dev/null || fail "the cluster of KUBECONFIG=$KUBECONFIG does not answer"
}
cluster_addresses() { :; }
cluster_down() { :; }
cluster_load() { step "not loaded (driver existing): $*"; }
