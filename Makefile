# `make run` shows it, `make test` proves it. Both install what they need.
SHELL := /bin/bash
.DEFAULT_GOAL := help
DATA ?= .run/chat
FILE ?= examples/chat.yaml
DRIVER ?= kind
SUITE ?= all
KEEP ?=
SOAK_SECONDS ?= 600

help: ## what there is
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## install what tests and demos need (Debian packages, Python and npm clients)
	@e2e/setup.sh

build: ## all programs, with the profile that run and test share
	cargo build --workspace --bins

run: setup build ## an evening peak on this machine: tiers scale, shards move, nothing is lost
	@e2e/run.sh "$(FILE)" "$(DATA)"

lint: ## formatting and clippy
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings

test: setup lint ## everything
	e2e/cluster/tools.sh helm
	cargo test --workspace --quiet --no-run
	REQUIRE_HELM=1 REQUIRE_PROMTOOL=1 $(if $(filter 0,$(shell id -u)),REQUIRE_MOUNT=1) cargo test --workspace

images: ## the container image, with docker or buildah; without either a docker-archive of it
	images/build.sh

cluster-up: ## a Kubernetes cluster to try things in; DRIVER=kind (default), host, api or existing
	e2e/cluster/up.sh $(DRIVER)

cluster-down: ## ends it
	e2e/cluster/down.sh

e2e: setup ## the tests on a real Kubernetes; SUITE=all (default) or ci, KEEP=1 leaves the cluster up
	SUITE=$(SUITE) DRIVER=$(DRIVER) KEEP=$(KEEP) e2e/cluster/run.sh

bench-operator: ## what the operator costs with 200 ImClusters of 50 simulated members on a real API server
	e2e/cluster/fleet.sh

fuzz: ## hostile bytes into sessions for a minute, guided by the branches that they reach
	gateway/fuzz/run.sh

bench: setup ## ratios beside peers and physical limits, our scaling beside the HPA's, the operator's costs, in one run
	if command -v go >/dev/null; then e2e/cluster/tools.sh nats-server mochi && e2e/cluster/fleet.sh; \
		else echo "without nats-server, mochi and a real API server, which are built with Go"; fi
	cargo test --workspace --quiet --lib autoscale::comparison -- --nocapture
	cargo build --workspace --bins --release
	e2e/bench.sh

soak: setup ## memory under load for SOAK_SECONDS (default ten minutes) has to be flat (release build)
	cargo build --workspace --bins --release
	e2e/bench.sh --only soak --soak-seconds $(SOAK_SECONDS)

clean: ## forget data of runs; keeps the build
	rm -rf .run

.PHONY: help setup build run lint test images cluster-up cluster-down e2e bench-operator fuzz bench soak clean
