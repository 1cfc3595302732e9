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

# Whose cluster it is: the STATE of the checkout that created it. Written before the cluster, so that none is without.
owner_file="$CACHE/clusters/$CLUSTER_NAME"
cluster_exists() { kind get clusters 2>/dev/null | grep -x "$CLUSTER_NAME" >/dev/null; }
is_ours() { [ "$(cat "$owner_file" 2>/dev/null)" = "$STATE" ]; }
delete_cluster() {
    rm -f "$STATE/created"
    kind delete cluster --name "$CLUSTER_NAME" --kubeconfig "$KUBECONFIG" --quiet
    rm -f "$owner_file"
}

create_cluster() {
    local image
    image="$(node_image)"
    step "kind create cluster ($image)"
    mkdir -p "$(dirname "$owner_file")"
    echo "$STATE" >"$owner_file"
    quietly "$CACHE/log/kind-create.log" kind create cluster --name "$CLUSTER_NAME" --image "$image" \
        --config "$CLUSTER_DIR/kind.yaml" --kubeconfig "$KUBECONFIG"
    touch "$STATE/created"
}

cluster_up() {
    "$CLUSTER_DIR/engine.sh" start
    use_engine
    "$CLUSTER_DIR/tools.sh" kind helm
    if cluster_exists && ! is_ours; then
        local owner
        owner="$(cat "$owner_file" 2>/dev/null || true)"
        # A checkout that is gone can't end its cluster any more.
        [ -n "$owner" ] && [ ! -e "$owner" ] ||
            fail "the kind cluster '$CLUSTER_NAME' belongs to ${owner:-somebody else}: end it there, or set CLUSTER_NAME to another name"
        step "the cluster of $owner, which is gone, is deleted"
        delete_cluster
    fi
    if ! cluster_exists; then
        create_cluster
    elif ! [ -e "$STATE/created" ] ||
        ! kind export kubeconfig --name "$CLUSTER_NAME" --kubeconfig "$KUBECONFIG" >"$CACHE/log/kind-kubeconfig.log" 2>&1; then
        step "the cluster was left half made; it is made anew"
        delete_cluster
        create_cluster
    fi
    command -v kubectl >/dev/null || "$CLUSTER_DIR/tools.sh" kubernetes
    # An API server that has just started knows its certificates before it knows their rights.
    wait_for 120 kubectl get nodes || fail "the API server of the cluster '$CLUSTER_NAME' gave no list of nodes within 120 s"
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
    # Another checkout's cluster of this name is not ours to end.
    if docker info >/dev/null 2>&1 && is_ours; then delete_cluster; fi
    "$CLUSTER_DIR/engine.sh" stop
}
