#!/usr/bin/env bash
# node/build.sh TAG: makes the image that kind runs as a node, from Debian packages and Go modules alone, and loads it into the
# engine (DOCKER_HOST) as TAG. For machines that can't pull kind's published image.
#
# The recipe is kind's own (images/base/Dockerfile and pkg/build/nodeimage of its module, whose files are used unchanged where
# possible): a systemd that runs containerd and kubelet, the images of the control plane already in containerd's store.
set -euo pipefail
# shellcheck source=../common.sh
. "$(dirname "$0")/../common.sh"
# shellcheck source=../debian.sh
. "$CLUSTER_DIR/debian.sh"
tag="$1"
node_sources="$CLUSTER_DIR/node"
work="$CACHE/node"
root="$work/root"
images="$work/images"

"$CLUSTER_DIR/tools.sh" kubernetes etcd coredns local-path-provisioner podnet
debian_packages containerd=containerd jq=jq cc=gcc /usr/include/stdlib.h=libc6-dev
kind_version="$(cd "$CLUSTER_DIR/tools/kind" && go list -m -f '{{.Version}}' sigs.k8s.io/kind)"
kind_module="$(cd "$CLUSTER_DIR/tools/kind" && go mod download -json "sigs.k8s.io/kind@$kind_version" | jq -r .Dir)"
rm -rf "$work"
mkdir -p "$images"

step "node: root file system"
# systemd must be older than 256 for cgroup v1, which bookworm's is.
debian_tree "$root" minbase systemd conntrack iptables nftables iproute2 ethtool util-linux mount kmod libseccomp2 pigz \
    e2fsprogs bash ca-certificates jq procps containerd runc containernetworking-plugins socat
# The module cache is read-only; those modes must not come along.
cp -r --no-preserve=mode,ownership "$kind_module/images/base/files/." "$root/"
chmod 755 "$root/kind" "$root/kind/bin" "$root"/kind/bin/*.sh "$root"/usr/local/bin/*
units="$root/lib/systemd/system"
find "$units/sysinit.target.wants/" -name systemd-tmpfiles-setup.service -delete
rm -f "$units"/{multi-user,local-fs,basic}.target.wants/* "$units"/sockets.target.wants/*{udev,initctl}* "$root"/etc/systemd/system/*.wants/*
echo ReadKMsg=no >>"$root/etc/systemd/journald.conf"
ln -sf /usr/lib/systemd/systemd "$root/sbin/init"
chroot "$root" systemctl --quiet enable kubelet containerd undo-mount-hacks
chroot "$root" systemctl --quiet mask systemd-binfmt

# Debian has containerd and the CNI plugins elsewhere than kind expects them.
mkdir -p "$root"/etc/kubernetes/manifests "$root"/opt/cni/bin "$root"/kind/manifests
for program in containerd ctr containerd-shim-runc-v2; do ln -sf /usr/bin/$program "$root/usr/local/bin/$program"; done
mv "$root"/usr/lib/cni/* "$root/opt/cni/bin/"
install -m755 "$BIN"/{kubelet,kubeadm,kubectl} "$root/usr/bin/"
install -m755 "$node_sources/crictl" "$root/usr/local/bin/crictl"
install -D -m755 "$CLUSTER_DIR/runc-limited" "$root/usr/local/sbin/runc"
install -m644 "$node_sources/manifests/cni.yaml" "$root/kind/manifests/default-cni.yaml"
install -m644 "$node_sources/manifests/storage.yaml" "$root/kind/manifests/default-storage.yaml"
printf %s "$KUBERNETES_VERSION" >"$root/kind/version"

# kubeadm says which names the control plane's images have.
image_name() { "$BIN/kubeadm" config images list --kubernetes-version "$KUBERNETES_VERSION" 2>/dev/null | grep "/$1:"; }
pause_image="$(image_name pause)"
# No negative oom_score_adj without CAP_SYS_RESOURCE; no AppArmor inside the node; the pause image that is there.
sed -i -e 's/restrict_oom_score_adj = false/restrict_oom_score_adj = true\n  disable_apparmor = true/' \
    -e "s#sandbox_image = .*#sandbox_image = \"$pause_image\"#" "$root/etc/containerd/config.toml"
chroot "$root" ctr oci spec | jq '.hooks.createContainer += [{"path": "/kind/bin/mount-product-files.sh"}] | del(.process.rlimits)' \
    >"$work/cri-base.json"
mv "$work/cri-base.json" "$root/etc/containerd/"

step "node: images of the control plane"
program_image() { archive "$images/$1.tar" --tag "$2" --entrypoint "[\"/usr/local/bin/$1\"]" "$BIN/$1=/usr/local/bin/$1"; }
for program in kube-apiserver kube-controller-manager kube-scheduler etcd coredns; do
    program_image $program "$(image_name $program)"
done
program_image local-path-provisioner localhost/local-path-provisioner:v1
cc -O2 -static -o "$work/pause" "$node_sources/pause.c"
archive "$images/pause.tar" --tag "$pause_image" --entrypoint '["/pause"]' "$work/pause=/pause"

tree="$work/network"
debian_tree "$tree" extract iptables nftables conntrack kmod iproute2 busybox-static
# Unpacked packages have no alternatives set.
for program in iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore; do
    ln -sf xtables-nft-multi "$tree/usr/sbin/$program"
done
mkdir -p "$tree/lib/modules"
for program in kube-proxy podnet; do
    install -m755 "$BIN/$program" "$tree/usr/local/bin/"
    name="$(image_name $program || echo localhost/podnet:v1)"
    archive "$images/$program.tar" --tag "$name" --entrypoint "[\"/usr/local/bin/$program\"]" "$tree/"
    rm "$tree/usr/local/bin/$program"
done
mkdir -p "$work/busybox"/{bin,tmp,etc,root}
install -m755 "$tree/bin/busybox" "$work/busybox/bin/"
chroot "$work/busybox" /bin/busybox --install /bin
archive "$images/busybox.tar" --tag localhost/busybox:v1 --entrypoint '["/bin/sh"]' "$work/busybox/"

step "node: images into containerd's store"
# By a containerd on this machine whose store is the node's; like kind's, it keeps the layers packed.
mkdir -p "$root/var/lib/containerd" "$ENGINE_RUN/preload"
cat >"$work/containerd.toml" <<TOML
version = 2
root = "$root/var/lib/containerd"
state = "$ENGINE_RUN/preload/state"
oom_score = 0
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "$ENGINE_RUN/preload/containerd.sock"
TOML
containerd --config "$work/containerd.toml" >"$CACHE/log/preload-containerd.log" 2>&1 &
containerd_pid=$!
trap 'kill $containerd_pid 2>/dev/null || true' EXIT
preload() { ctr --address "$ENGINE_RUN/preload/containerd.sock" --namespace k8s.io "$@"; }
wait_for 30 preload version || fail "containerd did not answer; its log: $CACHE/log/preload-containerd.log"
for image in "$images"/*.tar; do
    quietly "$CACHE/log/preload.log" preload images import --label=io.cri-containerd.pinned=pinned --all-platforms --no-unpack "$image"
done
kill $containerd_pid
wait $containerd_pid || true
trap - EXIT

step "node: into the engine"
rm -rf "$root"/etc/{machine-id,resolv.conf,hostname} "$root"/var/lib/apt/lists/*
touch "$root"/etc/{resolv.conf,hostname}
archive "$work/node.tar" --tag "$tag" --entrypoint '["/usr/local/bin/entrypoint", "/sbin/init"]' \
    --env container=docker --stop-signal SIGRTMIN+3 "$root/"
quietly "$CACHE/log/node-load.log" docker load --input "$work/node.tar"
rm -rf "$work"
step "node: $tag"
