#!/usr/bin/env bash
# images.sh: the images of what the tests run beside us in the cluster, PostgreSQL and Prometheus, as docker-archives in the
# cache; prints their paths. From Debian packages and Go modules on Debian 12, elsewhere pulled. Manifests use the same name for either.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
alone "$@"
# shellcheck source=debian.sh
. "$CLUSTER_DIR/debian.sh"

postgres_pull=postgres:15-bookworm
prometheus_pull=prom/prometheus:v3.10.0

from_debian() {
    local tree="$CACHE/tree"
    step "image: PostgreSQL"
    debian_tree "$tree" extract postgresql-15 busybox-static
    rm -rf "$tree"/usr/lib/x86_64-linux-gnu/libLLVM* "$tree"/usr/lib/postgresql/15/lib/{bitcode,llvmjit*}
    finish "$tree"
    # initdb asks who it is.
    printf 'root:x:0:0::/:/bin/sh\npostgres:x:999:999::/var/lib/postgresql:/bin/sh\n' >"$tree/etc/passwd"
    printf 'root:x:0:\npostgres:x:999:\n' >"$tree/etc/group"
    archive "$1" --tag localhost/postgres:15 --env PATH=/usr/lib/postgresql/15/bin:/usr/bin:/bin --user 999:999 "$tree/"
    rm -rf "$tree"

    # Debian's Prometheus was built without the discovery of Kubernetes' pods.
    "$CLUSTER_DIR/tools.sh" prometheus
    archive "$2" --tag localhost/prometheus:v3 --user 65534:65534 "$BIN/prometheus=/usr/bin/prometheus"
}

# Busybox is the shell and all the rest.
finish() {
    local applet
    for applet in $("$1/bin/busybox" --list); do
        [ -e "$1/bin/$applet" ] || [ -e "$1/usr/bin/$applet" ] || ln -s busybox "$1/bin/$applet"
    done
}

pulled() {
    quietly "$CACHE/log/pull.log" docker pull "$3"
    docker tag "$3" "$2"
    docker save --output "$1" "$2"
}

key="$(content_key "$CLUSTER_DIR/images.sh" "$CLUSTER_DIR/tools/prometheus" "$CLUSTER_DIR/debian.sh" "$REPOSITORY/images/archive.py")"
folder="$CACHE/images/$key"
if [ ! -e "$folder/done" ]; then
    rm -rf "$CACHE/images"
    mkdir -p "$folder"
    if grep -qs bookworm /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list && [ "$(id -u)" = 0 ]; then
        from_debian "$folder/postgres.tar" "$folder/prometheus.tar"
    else
        pulled "$folder/postgres.tar" localhost/postgres:15 "$postgres_pull"
        pulled "$folder/prometheus.tar" localhost/prometheus:v3 "$prometheus_pull"
    fi
    touch "$folder/done"
fi
printf '%s\n' "$folder"/{postgres,prometheus}.tar
