#!/usr/bin/env bash
# dump.sh FOLDER: all that helps to see why a test failed: states, events and logs into FOLDER; what isn't well, on the screen.
set -uo pipefail
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
# shellcheck source=/dev/null
[ ! -e "$STATE/env" ] || . "$STATE/env"
folder="${1:?usage: dump.sh FOLDER}"
mkdir -p "$folder"
# What drivers and the engine wrote: all there is when the cluster did not come up.
cp "$STATE"/*.log "$CACHE"/log/{dockerd,kind-create}.log "$folder" 2>/dev/null
kubectl() { timeout 60 "$(type -P kubectl)" "$@" 2>&1; }
if ! kubectl get --raw /readyz >/dev/null; then
    echo "--- the API server does not answer; logs: $folder"
    exit
fi

kubectl get pods --all-namespaces --output wide | tee "$folder/pods.txt"
kubectl get all,configmaps,persistentvolumeclaims,poddisruptionbudgets,networkpolicies,leases --all-namespaces --output wide >"$folder/objects.txt"
kubectl get imclusters,shardmaps --all-namespaces --output yaml >"$folder/imclusters.yaml"
kubectl describe nodes >"$folder/nodes.txt"
kubectl get events --all-namespaces --sort-by=.lastTimestamp >"$folder/events.txt"
echo "--- latest events"
tail -n 30 "$folder/events.txt"

# Logs of every pod that is not the cluster's own, of the container that ran before too.
kubectl get pods --all-namespaces --no-headers --output custom-columns=NAMESPACE:.metadata.namespace,NAME:.metadata.name |
    grep -vE '^(kube-system|local-path-storage) ' | while read -r namespace pod; do
    kubectl --namespace "$namespace" describe pod "$pod" >"$folder/$namespace.$pod.describe.txt"
    kubectl --namespace "$namespace" logs "$pod" --all-containers --timestamps >"$folder/$namespace.$pod.log"
    kubectl --namespace "$namespace" logs "$pod" --all-containers --timestamps --previous >"$folder/$namespace.$pod.previous.log" ||
        rm -f "$folder/$namespace.$pod.previous.log"
    ready="$(kubectl --namespace "$namespace" get pod "$pod" --output 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')"
    if [ "$ready" != True ]; then
        echo "--- $namespace/$pod is not ready; the end of its log:"
        tail -n 20 "$folder/$namespace.$pod.log"
    fi
done
echo "--- all of it: $folder"
