# Driver `existing`: somebody else's cluster, by KUBECONFIG. Nodes pull the tests' images from E2E_REGISTRY, which docker pushes to.
# What the tests put into it is taken away at the end, the definitions of ours too; where somebody has them already, nothing is done.
# shellcheck shell=bash
cluster_up() {
    command -v kubectl >/dev/null || "$CLUSTER_DIR/tools.sh" kubernetes
    command -v helm >/dev/null || "$CLUSTER_DIR/tools.sh" helm
    kubectl get --raw /readyz >/dev/null || fail "the cluster of KUBECONFIG=$KUBECONFIG does not answer"
}

# Node ports are reached at the first node, unless IM_NODE says where.
cluster_addresses() {
    local first='{.items[0].status.addresses[?(@.type=="InternalIP")].address}'
    echo "export IM_NODE=${IM_NODE:-$(kubectl get nodes --output "jsonpath=$first")}"
}

cluster_load() {
    local archive name pushed
    if [ ! -e "$STATE/ours" ]; then
        local theirs
        theirs="$(kubectl get --ignore-not-found --output name namespace/imcluster-system namespace/e2e-dependencies \
            customresourcedefinition/imclusters.imcluster.dev)"
        [ -z "$theirs" ] || fail "the cluster has $(echo "$theirs" | xargs) already; the tests would change and delete that"
        touch "$STATE/ours"
    fi
    for archive in "$@"; do
        name="$(tar --extract --to-stdout --file "$archive" manifest.json | python3 -c 'import json, sys; print(json.load(sys.stdin)[0]["RepoTags"][0])')"
        pushed="$E2E_REGISTRY/${name##*/}"
        step "docker push $pushed"
        quietly "$CACHE/log/push.log" docker load --input "$archive"
        docker tag "$name" "$pushed"
        quietly "$CACHE/log/push.log" docker push "$pushed"
    done
}

cluster_down() {
    [ -e "$STATE/ours" ] || return 0
    # shellcheck source=/dev/null
    . "$STATE/env"
    kubectl delete namespaces --selector imcluster.dev/e2e=true >/dev/null
    helm uninstall imcluster --namespace imcluster-system --ignore-not-found --wait >/dev/null
    kubectl delete --ignore-not-found namespace/imcluster-system namespace/e2e-dependencies clusterrole/e2e-prometheus \
        clusterrolebinding/e2e-prometheus customresourcedefinition/{imclusters,shardmaps}.imcluster.dev >/dev/null
}
