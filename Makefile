# make wheel     build dist/sglang-*.whl
# make test      build it, install it in an environment of its own, prove the contract
# make test-full   the same on every kind of server, and store the result by capability
# make check     prove that the series applies exactly and exports to the same files
# make wheel-all | test-all | check-all           the same for every release, in full
# make compatibility   make docs/compatibility.md and the table in README.md of the results
# make status    how much of upstream each series touches, its upstream status
# make pins      recompute the hashes of pins.toml
# make port      start the series of a release: FROM=v0.5.15.post1 TO=v0.5.16
# make upstream-prs   the patches as pull requests to upstream, in dist/upstream
# make install   put the wheel over the SGLang of an environment [PYTHON=python]; make uninstall undoes it
# make test-vllm rollout clients against this and against vLLM (3.5 GB), after make test
# make apply     put the series on a source tree in place: TREE=path [UPSTREAM=], make unapply TREE=
# make verify    check a model, or a running server: MODEL=path [ARGS="--url http://..."]
# make lint      lint the tools and tests, and as upstream does what the patches add and change
# make bench     measure what ids cost (with valgrind), then make bench/results/report.md (bench-report)
# make bench-vllm  what asking costs on vLLM, after make bench (3.5 GB)
# make mutants   break the patch on purpose and see that the tests notice
# make patch-tree | patch-new | patch-refresh     work on the series as git commits
# make clean     remove what was built
#
# UPSTREAM selects a release of pins.toml, ARGS is passed on. WHEEL_ARGS can name another
# --python-version and --machine for the releases that have compiled extensions.

UPSTREAM ?= v0.5.15.post1
PYTHON ?= python
RELEASE = --release $(UPSTREAM)
RELEASES = $(notdir $(wildcard patches/v*))
ENV = build/env-$(UPSTREAM)
# Read by the tests.
export UPSTREAM
# Images set it, and then every server of a test compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE

wheel:
	./build.sh $(RELEASE) $(WHEEL_ARGS)

test: wheel
	python3 tools/testenv.py $(RELEASE)
	$(ENV)/bin/python -m pytest -m "not full" $(ARGS) tests

test-full: wheel
	python3 tools/testenv.py $(RELEASE)
	status=0; $(ENV)/bin/python -m pytest --store-results $(ARGS) tests || status=$$?; \
	    python3 tools/compatibility.py && exit $$status

check:
	python3 tools/series.py $(RELEASE) check

check-all:
	python3 tools/series.py --release all check

wheel-all: $(addprefix wheel-,$(RELEASES))

wheel-v%:
	$(MAKE) wheel UPSTREAM=v$*

test-all: $(addprefix test-,$(RELEASES))

test-v%:
	$(MAKE) test-full UPSTREAM=v$*

compatibility:
	python3 tools/compatibility.py

status:
	python3 tools/status.py

pins:
	python3 tools/pins.py

port:
	python3 tools/port.py $(if $(FROM),--from $(FROM)) $(if $(TO),--to $(TO))

upstream-prs:
	python3 tools/pull_requests.py

install:
	python3 tools/install.py $(RELEASE) --python $(PYTHON) $(ARGS)

uninstall:
	python3 tools/install.py --undo --python $(PYTHON)

apply:
	python3 tools/apply.py $(if $(filter-out file,$(origin UPSTREAM)),$(RELEASE)) $(TREE)

unapply:
	python3 tools/apply.py --undo $(TREE)

verify:
	$(PYTHON) tools/verify.py $(if $(MODEL),--model $(MODEL)) $(ARGS)

lint: build/lint/bin/pre-commit
	build/lint/bin/pre-commit run --all-files

build/lint/bin/pre-commit:
	python3 -m venv build/lint
	build/lint/bin/pip install --quiet --disable-pip-version-check pre-commit==4.5.0

mutants: wheel
	python3 tools/testenv.py $(RELEASE)
	$(ENV)/bin/python -m tests.break_the_patch $(ARGS)

bench: wheel
	python3 tools/testenv.py $(RELEASE)
	$(ENV)/bin/python -m bench.serving_layer --json bench/results/serving_layer.json
	$(ENV)/bin/python -m bench.instructions --json bench/results/instructions.json
	$(ENV)/bin/python -m bench.http_process --json bench/results/http_process.json
	$(ENV)/bin/python -m bench.whole_server --json bench/results/whole_server.json
	$(ENV)/bin/python -m bench.memory --json bench/results/memory.json
	$(ENV)/bin/python -m bench.report

bench-vllm:
	$(ENV)/bin/python -m bench.vllm --json bench/results/vllm.json

test-vllm:
	TEST_VLLM=1 $(ENV)/bin/python -m pytest $(ARGS) tests/test_rollout_clients.py

bench-report:
	$(ENV)/bin/python -m bench.report

patch-tree:
	python3 tools/series.py $(RELEASE) tree

patch-new:
	python3 tools/series.py $(RELEASE) new

patch-refresh:
	python3 tools/series.py $(RELEASE) refresh

clean:
	rm -rf build dist

.PHONY: wheel wheel-all upstream-prs test test-full test-all compatibility test-vllm check check-all status pins port install uninstall apply unapply verify lint mutants bench bench-vllm bench-report patch-tree patch-new \
	patch-refresh clean
