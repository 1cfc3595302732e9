# Sourced by the scripts beside it: names, versions, where things are kept, how progress is told.
# shellcheck shell=bash

# shellcheck disable=SC2034  # most of these are for whoever sources this file
CLUSTER_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
REPOSITORY="$(cd "$CLUSTER_DIR/../.." && pwd)"

CLUSTER_NAME="${CLUSTER_NAME:-imcluster}"
KUBERNETES_VERSION=v1.34.4

# What was built or downloaded once and serves every later run: programs, images, the engine's own data.
CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/imcluster"
# What belongs to one cluster: kubeconfig, logs, pids. `down.sh` removes it.
STATE="${STATE:-$REPOSITORY/.run/cluster}"
# Sockets of a container engine that we started; below /run because a socket's path must be short.
ENGINE_RUN=/run/imcluster

BIN="$CACHE/bin"
PATH="$BIN:$PATH"
export KUBECONFIG="${KUBECONFIG:-$STATE/kubeconfig}"

started_at=$SECONDS
# Says what happens now and how long everything took so far.
step() { printf '[%4ds] %s\n' "$((SECONDS - started_at))" "$*" >&2; }
fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# Runs a command whose output matters only when it fails: `quietly LOGFILE COMMAND…`.
quietly() {
    local log="$1" status=0
    shift
    mkdir -p "$(dirname "$log")"
    "$@" >"$log" 2>&1 || status=$?
    if [ "$status" != 0 ]; then
        tail -n 40 "$log" >&2
        fail "failed ($status): $*; its whole output: $log"
    fi
}

# Waits until a command succeeds: `wait_for SECONDS COMMAND…`.
wait_for() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 0.2
    done
}

# Starts the calling script anew as the only one that changes the cache, the engine or clusters: checkouts share them. What it
# starts has the lock by that, what outlives it has not: `alone "$@"`.
alone() {
    if [ -n "${CACHE_LOCK:-}" ] || ! command -v flock >/dev/null; then return 0; fi
    mkdir -p "$CACHE"
    flock --nonblock "$CACHE/lock" true || step "waiting for another run that has $CACHE/lock"
    CACHE_LOCK=held exec flock --close "$CACHE/lock" "$0" "$@"
}

# Prints manifests, with the images of ours where the nodes find them.
manifests() {
    local file
    for file in "$@"; do
        echo ---
        sed "s#image: localhost/#image: ${E2E_REGISTRY:-localhost}/#" "$file"
    done
}

# One hash over the content and names of files and folders, and over further words after `--`.
content_key() {
    local paths=()
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        paths+=("$1")
        shift
    done
    {
        find "${paths[@]}" -type f -print0 | sort -z | xargs -0 sha256sum
        printf '%s\n' "$@"
    } | sed "s#$REPOSITORY/##" | sha256sum | cut -c1-16
}

# Installs Debian packages that are missing: `debian_packages COMMAND=PACKAGE…`. Nothing they bring is started.
debian_packages() {
    local missing=() pair
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null 2>&1 || [ -e "${pair%%=*}" ] || missing+=("${pair#*=}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        fail "missing: ${missing[*]}. Install them with your package manager and run this again."
    fi
    step "apt-get install ${missing[*]}"
    local policy=/usr/sbin/policy-rc.d made=
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
        made=yes
    fi
    export DEBIAN_FRONTEND=noninteractive
    quietly "$CACHE/log/apt.log" apt-get update -qq
    quietly "$CACHE/log/apt.log" apt-get install -qq -y --no-install-recommends "${missing[@]}"
    [ -z "$made" ] || rm -f "$policy"
}
