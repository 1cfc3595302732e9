#!/usr/bin/env bash
# engine.sh start | stop | host: a container engine for kind.
#
# `start` takes the one that answers (`docker info`). Where none does, it starts a dockerd of our own, from Debian's package,
# with its own socket, pid file and data: the data stays in the cache, so the next start finds its images. `stop` ends only
# what `start` started. `host` prints DOCKER_HOST's value: empty for an engine that was there already.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"

socket="$ENGINE_RUN/docker.sock"
pid_file="$ENGINE_RUN/docker.pid"
ours() { DOCKER_HOST="unix://$socket" timeout 10 docker info >/dev/null 2>&1; }
# A dockerd of another cache folder has the same socket and pid file, and is not ours to end.
lives() {
    local command
    command="$(tr '\0' ' ' 2>/dev/null <"/proc/$(cat "$pid_file" 2>/dev/null)/cmdline")" || return 1
    case $command in *"dockerd --config-file $CACHE/engine/daemon.json "*) ;; *) return 1 ;; esac
}

start() {
    mkdir -p "$CACHE"
    if ours; then return; fi
    if timeout 10 docker info >/dev/null 2>&1; then return; fi
    # On a busy machine an engine may live and not answer in time. A second one is never started beside it.
    if lives; then
        wait_for 60 ours || fail "dockerd (pid $(cat "$pid_file")) did not answer within 60 s; its log: $CACHE/log/dockerd.log"
        return
    fi
    [ "$(uname -s)" = Linux ] && [ "$(id -u)" = 0 ] ||
        fail "no container engine answers (docker info), and starting one needs root on Linux. Start Docker and run this again."
    debian_packages dockerd=docker.io docker=docker.io runc=runc containerd=containerd jq=jq iptables=iptables
    step "starting dockerd"
    mkdir -p "$ENGINE_RUN" "$CACHE/engine" "$CACHE/log"
    # A copy: the engine may outlive this checkout.
    install -m755 "$CLUSTER_DIR/runc-limited" "$CACHE/engine/runc-limited"
    cat >"$CACHE/engine/daemon.json" <<JSON
{
  "hosts": ["unix://$socket"],
  "data-root": "$CACHE/engine/data",
  "exec-root": "$ENGINE_RUN/exec",
  "pidfile": "$pid_file",
  "bridge": "none",
  "oom-score-adjust": 0,
  "runtimes": {"limited": {"path": "$CACHE/engine/runc-limited"}},
  "default-runtime": "limited"
}
JSON
    setsid dockerd --config-file "$CACHE/engine/daemon.json" >"$CACHE/log/dockerd.log" 2>&1 </dev/null &
    local child=$!
    if ! wait_for 60 ours; then
        tail -n 20 "$CACHE/log/dockerd.log" >&2
        fail "dockerd did not answer within 60 s; its log: $CACHE/log/dockerd.log"
    fi
    [ "$(cat "$pid_file")" = "$child" ] || fail "another dockerd (pid $(cat "$pid_file")) was started meanwhile: run this again"
    # Nodes whose engine was killed under them come back half started; the images are what is worth keeping.
    DOCKER_HOST="unix://$socket" docker ps --all --quiet |
        DOCKER_HOST="unix://$socket" xargs --no-run-if-empty docker rm --force --volumes >"$CACHE/log/engine-leftovers.log"
}

stop() {
    local pid
    lives || return 0
    pid="$(cat "$pid_file")"
    if ours && [ -n "$(DOCKER_HOST="unix://$socket" docker ps -q)" ]; then
        step "dockerd goes on: other containers run in it"
        return 0
    fi
    # The bridge of kind's network is in the kernel; dockerd would leave it there.
    DOCKER_HOST="unix://$socket" docker network rm kind >/dev/null 2>&1 || true
    kill "$pid"
    wait_for 30 test ! -e "/proc/$pid" || fail "dockerd (pid $pid) did not end within 30 s"
}

case ${1:-} in
start) start ;;
stop) stop ;;
host) ! ours || echo "unix://$socket" ;;
*) fail "usage: engine.sh start | stop | host" ;;
esac
