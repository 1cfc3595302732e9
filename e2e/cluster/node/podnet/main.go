// podnet gives the pods of a small cluster their network: one instance per node, in the host's network.
//
// It configures the node's CNI plugins with the pod subnet that the cluster gave to the node, keeps a route to each other
// node's pod subnet, and hides pods behind the node's address when they talk to the world outside. Nodes share a link (a
// container engine's bridge), so plain routes are enough. It doesn't enforce network policies.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	core "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

const (
	cniConfig = "/etc/cni/net.d/10-podnet.conflist"
	natChain  = "PODNET"
	// Routes and rules are put back within this time when somebody else removed them.
	repairInterval = 10 * time.Second
)

type config struct {
	nodeAddress string // this node's address on the link that the nodes share
	podSubnet   string // the whole cluster's pods, as CIDR
}

func main() {
	log.SetFlags(log.LstdFlags | log.LUTC)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, config{nodeAddress: os.Getenv("HOST_IP"), podSubnet: os.Getenv("POD_SUBNET")}); err != nil {
		log.Fatal(err)
	}
}

// run follows the cluster's nodes until ctx ends.
func run(ctx context.Context, c config) error {
	if net.ParseIP(c.nodeAddress) == nil {
		return fmt.Errorf("HOST_IP is not an address: %q", c.nodeAddress)
	}
	if _, _, err := net.ParseCIDR(c.podSubnet); err != nil {
		return fmt.Errorf("POD_SUBNET: %w", err)
	}
	cluster, err := rest.InClusterConfig()
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(cluster)
	if err != nil {
		return err
	}

	factory := informers.NewSharedInformerFactory(client, 0)
	nodes := factory.Core().V1().Nodes()
	changed := make(chan struct{}, 1)
	wake := func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	if _, err := nodes.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { wake() },
		UpdateFunc: func(any, any) { wake() },
		DeleteFunc: func(any) { wake() },
	}); err != nil {
		return err
	}
	factory.Start(ctx.Done())
	factory.WaitForCacheSync(ctx.Done())

	repair := time.NewTicker(repairInterval)
	defer repair.Stop()
	for {
		list, err := nodes.Lister().List(labels.Everything())
		if err == nil {
			err = c.apply(list)
		}
		if err != nil {
			log.Print(err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-repair.C:
		}
	}
}

// apply brings this machine to what the nodes say; it changes nothing that is right already.
func (c config) apply(nodes []*core.Node) error {
	errs := []error{c.masquerade()}
	for _, node := range nodes {
		address, pods := internalAddress(node), node.Spec.PodCIDR
		switch {
		case address == "" || pods == "": // not set up yet; the next update says it
		case address == c.nodeAddress:
			errs = append(errs, writeCNIConfig(pods))
		default:
			errs = append(errs, command("ip", "route", "replace", pods, "via", address))
		}
	}
	return errors.Join(errs...)
}

func internalAddress(node *core.Node) string {
	for _, address := range node.Status.Addresses {
		if address.Type == core.NodeInternalIP && net.ParseIP(address.Address).To4() != nil {
			return address.Address
		}
	}
	return ""
}

// writeCNIConfig tells the container runtime how to connect a pod: a point-to-point link, an address of the node's subnet.
func writeCNIConfig(pods string) error {
	type object = map[string]any
	content, err := json.MarshalIndent(object{
		"cniVersion": "0.3.1",
		"name":       "podnet",
		"plugins": []object{
			{
				"type": "ptp",
				"mtu":  1500,
				"ipam": object{
					"type":    "host-local",
					"dataDir": "/run/podnet",
					"ranges":  [][]object{{{"subnet": pods}}},
					"routes":  []object{{"dst": "0.0.0.0/0"}},
				},
			},
			{"type": "portmap", "capabilities": object{"portMappings": true}},
		},
	}, "", "  ")
	if err != nil {
		return err
	}
	if old, err := os.ReadFile(cniConfig); err == nil && string(old) == string(content) {
		return nil
	}
	// The runtime watches the folder and must not see half a file.
	temporary := filepath.Join(filepath.Dir(cniConfig), ".podnet")
	if err := os.WriteFile(temporary, content, 0o644); err != nil {
		return err
	}
	log.Printf("pods of this node: %s", pods)
	return os.Rename(temporary, cniConfig)
}

// masquerade hides pods behind the node, except among pods (whose addresses are routed) and towards the node itself.
func (c config) masquerade() error {
	if command("iptables", "-w", "-t", "nat", "-n", "-L", natChain) != nil {
		if err := command("iptables", "-w", "-t", "nat", "-N", natChain); err != nil {
			return err
		}
	}
	return errors.Join(
		natRule(natChain, "-d", c.podSubnet, "-j", "RETURN"),
		natRule(natChain, "-j", "MASQUERADE"),
		natRule("POSTROUTING", "-s", c.podSubnet, "-m", "addrtype", "!", "--dst-type", "LOCAL", "-j", natChain),
	)
}

// natRule appends a rule unless it is there.
func natRule(chain string, rule ...string) error {
	nat := func(action string) error {
		return command("iptables", append([]string{"-w", "-t", "nat", action, chain}, rule...)...)
	}
	if nat("-C") == nil {
		return nil
	}
	return nat("-A")
}

func command(name string, arguments ...string) error {
	output, err := exec.Command(name, arguments...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %v: %w: %s", name, arguments, err, output)
	}
	return nil
}
