#!/usr/bin/env bash
# tools.sh [NAME…]: builds the Go programs that the cluster is made of (all without a NAME) from their modules, pinned by
# tools/*/go.{mod,sum}, into the cache. What is built and unchanged costs nothing. Benchmarks have their peers from here, too.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
alone "$@"

# The packages of a module's programs.
packages_of() {
    case $1 in
    kubernetes)
        printf 'k8s.io/kubernetes/cmd/%s\n' kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubeadm kubectl
        ;;
    etcd) echo go.etcd.io/etcd/server/v3 ;;
    coredns) echo imcluster.dev/e2e/tools/coredns ;;
    local-path-provisioner) echo github.com/rancher/local-path-provisioner ;;
    kind) echo sigs.k8s.io/kind ;;
    prometheus) echo github.com/prometheus/prometheus/cmd/prometheus ;;
    helm) echo helm.sh/helm/v3/cmd/helm ;;
    nats-server) echo github.com/nats-io/nats-server/v2 ;;
    mochi) echo github.com/mochi-mqtt/server/v2/cmd ;;
    podnet) echo imcluster.dev/e2e/podnet ;;
    *) fail "no such tool: $1" ;;
    esac
}

build() {
    local name="$1" folder="$CLUSTER_DIR/tools/$1" flags="-s -w" tags="" key mark="$BIN/.$1.key"
    [ "$name" = podnet ] && folder="$CLUSTER_DIR/node/podnet"
    if [ "$name" = kubernetes ]; then
        local minor="${KUBERNETES_VERSION#v1.}"
        flags+=" -X k8s.io/component-base/version.gitVersion=$KUBERNETES_VERSION -X k8s.io/component-base/version.gitMajor=1"
        flags+=" -X k8s.io/component-base/version.gitMinor=${minor%%.*} -X k8s.io/client-go/pkg/version.gitVersion=$KUBERNETES_VERSION"
    fi
    # Of the many ways to discover targets, only Kubernetes': the others' libraries take minutes to compile.
    [ "$name" = prometheus ] && tags=remove_all_sd,enable_kubernetes_sd
    key="$(content_key "$folder" -- "$(go version)" "$flags" "$tags")"
    [ "$(cat "$mark" 2>/dev/null)" != "$key" ] || return 0
    step "go build $name"
    local made="$BIN/.$name.new" packages
    mapfile -t packages < <(packages_of "$name")
    rm -rf "$made"
    mkdir "$made"
    (cd "$folder" && quietly "$CACHE/log/go-$name.log" \
        env CGO_ENABLED=0 GOFLAGS=-buildvcs=false go build -ldflags "$flags" -tags "$tags" -o "$made/" "${packages[@]}")
    # Some packages are called `server` or `cmd`.
    [ ${#packages[@]} != 1 ] || [ -e "$made/$name" ] || mv "$made"/* "$made/$name"
    # Moved: a program that somebody runs is replaced, not overwritten.
    mv "$made"/* "$BIN/"
    rmdir "$made"
    echo "$key" >"$mark"
}

command -v go >/dev/null || fail "missing: go (1.25 or newer). Install it from your distribution or go.dev and run this again."
mkdir -p "$BIN"
[ $# -gt 0 ] || set -- kubernetes etcd coredns local-path-provisioner podnet kind helm prometheus
for name in "$@"; do build "$name"; done
