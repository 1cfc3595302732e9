# Sourced after common.sh by drivers whose control plane is processes of this machine.
# shellcheck shell=bash

# Prints ports of 127.0.0.1 that nobody listens on: `free_ports COUNT`.
free_ports() {
    python3 -c 'import socket, sys
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(s.getsockname()[1] for s in sockets))' "$1"
}

# Ends a process by its pid file, if it is still the program that we started.
end() {
    local pid
    pid="$(cat "$STATE/$1.pid" 2>/dev/null)" || return 0
    if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "${1:0:15}" ]; then
        kill "$pid"
        wait_for 20 test ! -e "/proc/$pid" || kill -9 "$pid"
    fi
    rm -f "$STATE/$1.pid"
}

# Starts a program in the background: `begin NAME ARGUMENT…`. Ours are first in PATH.
begin() {
    local name="$1"
    shift
    setsid "$name" "$@" >"$STATE/$name.log" 2>&1 </dev/null &
    echo $! >"$STATE/$name.pid"
}

# A key and a certificate, signed by our authority: `certificate NAME SUBJECT [EXTENSIONS]`.
certificate() {
    openssl req -newkey rsa:2048 -nodes -keyout "$STATE/$1.key" -subj "$2" 2>/dev/null |
        openssl x509 -req -days 30 -CA "$STATE/ca.crt" -CAkey "$STATE/ca.key" -CAcreateserial -out "$STATE/$1.crt" \
            -extfile <(printf "%s\n" "${3:-basicConstraints=CA:FALSE}") 2>/dev/null
}

# etcd and kube-apiserver at ADDRESS, which pods reach too, with service addresses from SERVICES (CIDR), and a kubeconfig for them:
# `begin_api_server ADDRESS SERVICES ADVERTISED [ARGUMENT…]`.
begin_api_server() {
    local address="$1" services="$2" api_port etcd_port peer_port
    read -r api_port etcd_port peer_port < <(free_ports 3)
    openssl req -x509 -newkey rsa:2048 -nodes -days 30 -keyout "$STATE/ca.key" -out "$STATE/ca.crt" -subj /CN=e2e 2>/dev/null
    certificate server /CN=kube-apiserver "subjectAltName=IP:$address,IP:${services%.*}.1,DNS:localhost,DNS:kubernetes.default.svc"
    certificate admin /O=system:masters/CN=admin
    openssl genrsa -out "$STATE/accounts.key" 2048 2>/dev/null

    step "etcd and kube-apiserver"
    begin etcd --data-dir "$STATE/etcd" --unsafe-no-fsync --log-level warn \
        --listen-client-urls "http://127.0.0.1:$etcd_port" --advertise-client-urls "http://127.0.0.1:$etcd_port" \
        --listen-peer-urls "http://127.0.0.1:$peer_port"
    begin kube-apiserver --etcd-servers "http://127.0.0.1:$etcd_port" --bind-address "$address" --secure-port "$api_port" \
        --advertise-address "$3" --service-cluster-ip-range "$services" --authorization-mode Node,RBAC \
        --client-ca-file "$STATE/ca.crt" --tls-cert-file "$STATE/server.crt" --tls-private-key-file "$STATE/server.key" \
        --kubelet-preferred-address-types InternalIP --kubelet-client-certificate "$STATE/admin.crt" --kubelet-client-key "$STATE/admin.key" --allow-privileged \
        --service-account-issuer https://kubernetes.default.svc --service-account-key-file "$STATE/accounts.key" \
        --service-account-signing-key-file "$STATE/accounts.key" "${@:4}"

    kubectl config set-cluster e2e --server "https://$address:$api_port" --certificate-authority "$STATE/ca.crt" --embed-certs >/dev/null
    kubectl config set-credentials admin --client-certificate "$STATE/admin.crt" --client-key "$STATE/admin.key" --embed-certs >/dev/null
    kubectl config set-context e2e --cluster e2e --user admin >/dev/null
    kubectl config use-context e2e >/dev/null
    if ! wait_for 60 kubectl get --raw /readyz; then
        tail -n 20 "$STATE/kube-apiserver.log" >&2
        fail "kube-apiserver did not become ready within 60 s; its log: $STATE/kube-apiserver.log"
    fi
}
