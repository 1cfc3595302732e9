# Driver `host`: one node on the machine itself, its control plane and kubelet being processes. No container engine and no node image:
# up within half a minute, for a quick inner loop. Needs root on Debian 12. Not for evictions: there is no other node to go to.
# shellcheck shell=bash
# shellcheck source=../processes.sh
. "$CLUSTER_DIR/processes.sh"
# shellcheck source=../debian.sh
. "$CLUSTER_DIR/debian.sh"

# Other addresses than kind's, so that both can be up.
pods=10.245.0.0/24 node_address=10.245.0.1 services=10.97.0.0/16 names=10.97.0.10 bridge=imcluster0
# Sockets need short paths, volumes and mounts a file system of their own life.
host_run=/run/imcluster-host
host_images="$CACHE/host"
programs=(kube-proxy kubelet kube-scheduler kube-controller-manager containerd kube-apiserver etcd)
containers() { ctr --address "$host_run/containerd.sock" --namespace k8s.io "$@"; }

# Images of what a node itself runs, in the names that manifests use.
node_images() {
    local out="$host_images/archives"
    # Made anew when what is in them was built anew.
    [ ! -e "$out/done" ] || [ "$BIN/coredns" -nt "$out/done" ] || [ "$BIN/local-path-provisioner" -nt "$out/done" ] || return 0
    rm -rf "$out"
    mkdir -p "$out/tree/bin" "$out/tree/tmp" "$out/tree/etc" "$out/tree/root"
    cc -O2 -static -o "$out/pause" "$CLUSTER_DIR/node/pause.c"
    archive "$out/pause.tar" --tag localhost/pause:v1 --entrypoint '["/pause"]' "$out/pause=/pause"
    install -m755 "$(command -v busybox)" "$out/tree/bin/busybox"
    chroot "$out/tree" /bin/busybox --install /bin
    archive "$out/busybox.tar" --tag localhost/busybox:v1 --entrypoint '["/bin/sh"]' "$out/tree/"
    archive "$out/provisioner.tar" --tag localhost/local-path-provisioner:v1 \
        --entrypoint '["/usr/local/bin/local-path-provisioner"]' "$BIN/local-path-provisioner=/usr/local/bin/local-path-provisioner"
    archive "$out/coredns.tar" --tag localhost/coredns:v1 --entrypoint '["/usr/local/bin/coredns"]' "$BIN/coredns=/usr/local/bin/coredns"
    touch "$out/done"
}

begin_containerd() {
    mkdir -p "$host_run/cni" "$host_images/containerd"
    install -m755 "$CLUSTER_DIR/runc-limited" "$host_run/runc-limited"
    cat >"$host_run/cni/10-pods.conflist" <<JSON
{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "$bridge", "isDefaultGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "$host_run/addresses", "ranges": [[{"subnet": "$pods", "gateway": "$node_address"}]]}},
  {"type": "firewall"},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
JSON
    cat >"$STATE/containerd.toml" <<TOML
version = 2
root = "$host_images/containerd"
state = "$host_run/containerd"
oom_score = 0
[grpc]
address = "$host_run/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
restrict_oom_score_adj = true
disable_apparmor = true
sandbox_image = "localhost/pause:v1"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "$host_run/cni"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
BinaryName = "$host_run/runc-limited"
TOML
    begin containerd --config "$STATE/containerd.toml"
    wait_for 30 containers version || fail "containerd did not answer; its log: $STATE/containerd.log"
    local image
    for image in "$host_images"/archives/*.tar; do
        quietly "$CACHE/log/host-images.log" containers images import --all-platforms "$image"
    done
}

begin_node() {
    local proxy_health proxy_metrics manager_port scheduler_port
    read -r proxy_health proxy_metrics manager_port scheduler_port < <(free_ports 4)
    begin kube-controller-manager --kubeconfig "$KUBECONFIG" --service-account-private-key-file "$STATE/accounts.key" \
        --root-ca-file "$STATE/ca.crt" --leader-elect=false --bind-address 127.0.0.1 --secure-port "$manager_port"
    begin kube-scheduler --kubeconfig "$KUBECONFIG" --leader-elect=false --bind-address 127.0.0.1 --secure-port "$scheduler_port"
    cat >"$STATE/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: $node_address
healthzPort: 0
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $STATE/ca.crt}}
authorization: {mode: Webhook}
cgroupDriver: cgroupfs
clusterDNS: [$names]
clusterDomain: cluster.local
containerRuntimeEndpoint: unix://$host_run/containerd.sock
enforceNodeAllocatable: []
# The machine's disk is its owner's affair.
evictionHard: {memory.available: "0%", nodefs.available: "0%", nodefs.inodesFree: "0%", imagefs.available: "0%"}
imageGCHighThresholdPercent: 100
failSwapOn: false
failCgroupV1: false
featureGates: {KubeletInUserNamespace: true}
podLogsDir: $host_run/logs
YAML
    begin kubelet --config "$STATE/kubelet.yaml" --kubeconfig "$KUBECONFIG" --hostname-override imcluster-host \
        --node-ip "$node_address" --root-dir "$host_run/kubelet"
    cat >"$STATE/kube-proxy.yaml" <<YAML
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: $KUBECONFIG}
hostnameOverride: imcluster-host
mode: iptables
clusterCIDR: $pods
# Pods share a bridge: without it an answer would go to the asking pod directly, from an address that it does not know.
iptables: {masqueradeAll: true}
nodePortAddresses: [$node_address/32]
conntrack: {maxPerCore: 0, min: 0, tcpCloseWaitTimeout: 0s, tcpEstablishedTimeout: 0s}
healthzBindAddress: 127.0.0.1:$proxy_health
metricsBindAddress: 127.0.0.1:$proxy_metrics
YAML
    begin kube-proxy --config "$STATE/kube-proxy.yaml"
}

cluster_up() {
    [ "$(uname -s)" = Linux ] && [ "$(id -u)" = 0 ] || fail "driver 'host' needs root on Linux; use DRIVER=kind"
    debian_packages containerd=containerd runc=runc jq=jq iptables=iptables conntrack=conntrack busybox=busybox-static cc=gcc \
        /usr/lib/cni/bridge=containernetworking-plugins /usr/include/stdlib.h=libc6-dev
    "$CLUSTER_DIR/tools.sh" etcd kubernetes coredns local-path-provisioner helm
    ! kubectl get --raw /readyz >/dev/null 2>&1 || return 0
    node_images
    # Pods reach the API server here.
    ip link show "$bridge" >/dev/null 2>&1 || ip link add "$bridge" type bridge
    ip address replace "$node_address/24" dev "$bridge"
    ip link set "$bridge" up
    sysctl -qw net.ipv4.ip_forward=1
    begin_api_server "$node_address" "$services" "$node_address"
    step "the node"
    begin_containerd
    begin_node
    wait_for 60 kubectl wait --for=condition=Ready node/imcluster-host --timeout=1s ||
        fail "the node does not become ready; its log: $STATE/kubelet.log"
    kubectl apply --filename "$CLUSTER_DIR/node/manifests/storage.yaml" --filename "$CLUSTER_DIR/drivers/host-dns.yaml" >/dev/null
    kubectl --namespace kube-system rollout status deployment/coredns --timeout=60s >/dev/null
}

cluster_addresses() { echo "export IM_NODE=$node_address"; }

cluster_load() {
    local image
    for image in "$@"; do quietly "$CACHE/log/host-images.log" containers images import --all-platforms "$image"; done
}

cluster_down() {
    local program task
    # Nobody makes pods again; the kubelet ends those that are there, and the network plugins put the machine's rules back.
    end kube-controller-manager
    end kube-scheduler
    kubectl delete pods --all --all-namespaces --grace-period=1 --wait=false >/dev/null 2>&1 || true
    no_tasks() { [ -z "$(containers tasks list --quiet)" ]; }
    wait_for 30 no_tasks || true
    end kubelet
    for task in $(containers tasks list --quiet 2>/dev/null || true); do
        containers tasks kill --all --signal SIGKILL "$task" >/dev/null 2>&1 || true
    done
    for program in "${programs[@]}"; do end "$program"; done
    "$BIN/kube-proxy" --cleanup >"$STATE/cleanup.log" 2>&1 || true
    # Volumes of pods that did not end in time.
    awk -v below="$host_run/" 'index($2, below) == 1 { print $2 }' /proc/mounts | sort -r | xargs --no-run-if-empty umount --lazy
    ip link delete "$bridge" 2>/dev/null || true
    rm -rf "$host_run"
}
