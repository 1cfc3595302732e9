# `make run` shows it, `make test` proves it. Both install what they need.
SHELL := /bin/bash
.DEFAULT_GOAL := help
DATA ?= .run/chat
FILE ?= examples/chat.yaml

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

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
	cargo test --workspace --quiet --no-run
	cargo test --workspace

bench: setup ## ratios beside peers and physical limits, in one run (release build)
	cargo build --workspace --bins --release
	e2e/bench.sh

clean: ## forget data of runs; keeps the build
	rm -rf .run

.PHONY: help setup build run lint test bench clean
