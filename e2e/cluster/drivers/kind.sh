# Driver `kind`: nodes in containers.
# shellcheck shell=bash

use_engine() {
    local host
    host="$("$CLUSTER_DIR/engine.sh" host)"
    [ -z "$host" ] || export DOCKER_HOST="$host"
}

# Prints the node image: the published one if it can be had, else ours, made now if need be.
node_image() {
    local published="kindest/node:$KUBERNETES_VERSION" ours
    if docker image inspect "$published" >/dev/null 2>&1; then
        echo "$published"
        return
    fi
    # Everything that ends up in it is in its name.
    ours="localhost/imcluster-node:$KUBERNETES_VERSION-$(content_key "$CLUSTER_DIR/node" "$CLUSTER_DIR/runc-limited" \
        "$CLUSTER_DIR"/tools/{kubernetes,etcd,coredns,local-path-provisioner,kind} \
        "$CLUSTER_DIR/tools.sh" "$CLUSTER_DIR/debian.sh" "$REPOSITORY/images/archive.py")"
    if ! docker image inspect "$ours" >/dev/null 2>&1; then
        step "pulling $published"
        if timeout 300 docker pull --quiet "$published" >"$CACHE/log/pull.log" 2>&1; then
            echo "$published"
            return
        fi
        step "it can't be pulled ($(tail -n 1 "$CACHE/log/pull.log")); building a node image instead"
        "$CLUSTER_DIR/node/build.sh" "$ours" >&2
        # Of ours, only the newest is kept.
        docker images --format '{{.Repository}}:{{.Tag}}' localhost/imcluster-node | grep -vxF "$ours" | xargs --no-run-if-empty docker rmi >/dev/null || true
    fi
    echo "$ours"
}

cluster_up() {
    "$CLUSTER_DIR/engine.sh" start
    use_engine
    "$CLUSTER_DIR/tools.sh" kind helm
    if ! kind get clusters 2>/dev/null | grep -qx "$CLUSTER_NAME"; then
        local image
        image="$(node_image)"
        step "kind create cluster ($image)"
        quietly "$CACHE/log/kind-create.log" kind create cluster --name "$CLUSTER_NAME" --image "$image" \
            --config "$CLUSTER_DIR/kind.yaml" --kubeconfig "$KUBECONFIG"
    else
        quietly "$CACHE/log/kind-kubeconfig.log" kind export kubeconfig --name "$CLUSTER_NAME" --kubeconfig "$KUBECONFIG"
    fi
    command -v kubectl >/dev/null || "$CLUSTER_DIR/tools.sh" kubernetes
    kubectl wait --for=condition=Ready nodes --all --timeout=120s >/dev/null
    kubectl -n kube-system rollout status deployment/coredns --timeout=120s >/dev/null
}

# Where clients on this machine find a node port: `IM_NODE` has them all (Linux); the mapped ones work everywhere.
cluster_addresses() {
    local node="$CLUSTER_NAME-control-plane" mapping port
    echo "export IM_NODE=$(docker inspect --format '{{.NetworkSettings.Networks.kind.IPAddress}}' "$node")"
    docker port "$node" | while read -r port _ mapping; do
        port="${port%/*}"
        [ "$port" = 6443 ] || echo "export IM_NODE_PORT_$port=$mapping"
    done
}

cluster_load() {
    use_engine
    local archive
    for archive in "$@"; do kind load image-archive "$archive" --name "$CLUSTER_NAME" --quiet; done
}

cluster_down() {
    use_engine
    if docker info >/dev/null 2>&1; then
        kind delete cluster --name "$CLUSTER_NAME" --kubeconfig "$KUBECONFIG" --quiet
    fi
    "$CLUSTER_DIR/engine.sh" stop
}
