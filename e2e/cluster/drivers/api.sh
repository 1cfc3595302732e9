# Driver `api`: etcd and kube-apiserver as two processes of this machine. No nodes and no controllers: objects are stored,
# checked and watched, and nothing acts on them but what is being tried.
# shellcheck shell=bash
# shellcheck source=../processes.sh
. "$CLUSTER_DIR/processes.sh"

cluster_up() {
    "$CLUSTER_DIR/tools.sh" etcd kubernetes helm
    ! kubectl get --raw /readyz >/dev/null 2>&1 || return 0
    end kube-apiserver
    end etcd
    # Nobody follows the service of the API server here; the address only has to be one that it accepts.
    begin_api_server 127.0.0.1 10.96.0.0/16 "$(hostname -I | cut -d' ' -f1)" --disable-admission-plugins ServiceAccount
}
cluster_addresses() { :; }
cluster_load() { fail "driver 'api' runs no pods"; }
cluster_down() {
    end kube-apiserver
    end etcd
}
