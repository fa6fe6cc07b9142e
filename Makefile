# Use it
#   make wheel          build dist/sglang-*.whl: the stock wheel with the series
#   make install        put it over the SGLang of an environment: PYTHON=python
#   make uninstall      go back to stock there
#   make apply          put the series on a source tree in place: TREE=path
#   make unapply        take it off again
#   make verify         check a model: MODEL=path, or a server: ARGS="--url http://..."
# Test it
#   make test           build the wheel, install it in an environment of its own, prove the contract
#   make test-full      the same on every kind of server, and store the result by capability
#   make test-all       the same for every release
#   make test-vllm      rollout clients against this and against vLLM (3.5 GB)
#   make environment    only make that environment, build/env-<release>
#   make mutants        break the patches and the tools on purpose and see that the tests notice
#   make compatibility  make docs/compatibility.md and the table in README.md of the results
# Work on the series
#   make patch-tree     build/<release>/tree: a git repository, one commit for each patch
#   make patch-new      commit the changes in it with the header of a patch
#   make patch-refresh  export the commits to patches/
#   make check          prove that the series applies exactly and exports to the same files
#   make check-all      the same for every release, as wheel-all builds every wheel
#   make lint           lint tools and tests, and as upstream does what the patches add and change
#   make status         how much of upstream each series touches, and its upstream status
#   make port           start the series of a release: FROM=v0.5.15.post1 TO=v0.5.16
#   make pins           recompute the hashes of pins.toml
#   make upstream-prs   the patches as pull requests to upstream, in dist/upstream
#   make check-upstream prove them: each alone and all in order, their tests, upstream's hooks
# Measure it
#   make bench          measure what ids cost (with valgrind), and make the report
#   make bench-report   make bench/results/report.md of what was measured
#   make bench-vllm     measure what asking costs on vLLM, after make bench (3.5 GB)
#
# UPSTREAM=v0.5.23 selects a release of pins.toml, and ARGS is passed on. WHEEL_ARGS can name
# another --python-version and --machine for the releases that have compiled extensions.
# `make clean` removes what was built. `python -m tools` lists the commands behind all this.

# Whether the user names them, before they have a value.
NAMED_RELEASE := $(UPSTREAM)
NAMED_PYTHON := $(PYTHON)
UPSTREAM ?= v0.5.15.post1
# With its v or without.
override UPSTREAM := v$(patsubst v%,%,$(UPSTREAM))
PYTHON ?= $(or $(shell command -v python),python3)
# Processes of `make test`. They wait for servers more than they compute.
WORKERS ?= 2
RELEASE = --release $(UPSTREAM)
RELEASES = $(notdir $(wildcard patches/v*))
ENV = build/env-$(UPSTREAM)
TOOLS = python3 -m tools
# Read by the tests.
export UPSTREAM
# Images set it, and then every server of a test compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE

help:
	@sed '/^$$/,$$d; s/^# \{0,1\}//' Makefile

wheel:
	./build.sh $(RELEASE) $(WHEEL_ARGS)

environment: wheel
	$(TOOLS) environment $(RELEASE) tests

# For what does not need the wheel of the series as it is.
$(ENV)/bin/python:
	$(MAKE) environment

test: environment
	$(ENV)/bin/python -m pytest -m "not full" -n $(WORKERS) --dist loadgroup $(ARGS) tests

test-full: environment
	status=0; $(ENV)/bin/python -m pytest --store-results $(ARGS) tests || status=$$?; \
	    $(TOOLS) compatibility && exit $$status

check:
	$(TOOLS) series $(RELEASE) check

check-all:
	$(TOOLS) series --release all check

wheel-all: $(addprefix wheel-,$(RELEASES))

wheel-v%:
	$(MAKE) wheel UPSTREAM=v$*

test-all: $(addprefix test-,$(RELEASES))

test-v%:
	$(MAKE) test-full UPSTREAM=v$*

compatibility:
	$(TOOLS) compatibility

status:
	$(TOOLS) status

pins:
	$(TOOLS) pins

port:
	$(TOOLS) port $(if $(FROM),--from $(FROM)) $(if $(TO),--to $(TO))

upstream-prs:
	$(TOOLS) pull-requests

check-upstream:
	$(TOOLS) pull-requests --check $(ARGS)

install:
	$(TOOLS) install $(RELEASE) --python "$(PYTHON)" $(ARGS)

uninstall:
	$(TOOLS) install --undo --python "$(PYTHON)"

apply:
	$(TOOLS) apply $(if $(NAMED_RELEASE),$(RELEASE)) $(if $(TREE),"$(TREE)")

unapply:
	$(TOOLS) apply --undo $(if $(TREE),"$(TREE)")

verify:
	"$(PYTHON)" -m tools verify $(if $(MODEL),--model "$(MODEL)") \
	    $(if $(NAMED_PYTHON),,--otherwise $(ENV)/bin/python) $(ARGS)

lint: build/lint/bin/pre-commit
	build/lint/bin/pre-commit run --all-files

build/lint/bin/pre-commit:
	$(TOOLS) environment lint

mutants: environment
	$(ENV)/bin/python -m tests.break_the_patch $(ARGS)

bench: environment
	$(ENV)/bin/python -m bench.serving_layer --json bench/results/serving_layer.json
	$(ENV)/bin/python -m bench.instructions --json bench/results/instructions.json
	$(ENV)/bin/python -m bench.http_process --json bench/results/http_process.json
	$(ENV)/bin/python -m bench.whole_server --json bench/results/whole_server.json
	$(ENV)/bin/python -m bench.memory --json bench/results/memory.json
	$(ENV)/bin/python -m bench.logit_processors --json bench/results/logit_processors.json
	$(ENV)/bin/python -m bench.report

bench-vllm: $(ENV)/bin/python
	$(ENV)/bin/python -m bench.vllm --json bench/results/vllm.json

bench-report: $(ENV)/bin/python
	$(ENV)/bin/python -m bench.report

test-vllm: $(ENV)/bin/python
	TEST_VLLM=1 $(ENV)/bin/python -m pytest $(ARGS) tests/test_rollout_clients.py

patch-tree:
	$(TOOLS) series $(RELEASE) tree

patch-new:
	$(TOOLS) series $(RELEASE) new

patch-refresh:
	$(TOOLS) series $(RELEASE) refresh

clean:
	rm -rf build dist

.PHONY: help wheel environment test test-full check check-all wheel-all test-all compatibility \
	status pins port upstream-prs check-upstream install uninstall apply unapply verify lint \
	mutants bench bench-vllm bench-report test-vllm patch-tree patch-new patch-refresh clean
