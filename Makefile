# What a developer does daily. The first call makes the environment and builds the extension.
#
#   make demo     train on real digits, stock PyTorch and fastmlp side by side
#   make test     every behaviour once; make test-all adds what is slow: every instruction set, under sanitizers too,
#                 PyTorch's own suites, sweeps of the emulators, builds, other compilers, twenty times as many random
#                 forwards; make test-slow is that alone
#   make mutants  plants faults in the sources, one after the other, and tells which ones the tests do not find
#   make lint     what CI checks besides; make format mends what can be mended
#   make bench    measure again: benchmarks/results/ and the figures of README and docs
#   make bench-peers   the same against JAX, TensorFlow, Keras and ONNX Runtime, in an environment of its own
#   make test-integrations, bench-integrations
#                 the same with models and trainers of other libraries, in an environment of its own
#   make docs     the site of README and docs/, in build/site; a broken link fails
#   make wheel    a wheel in dist/, for the torch release of the environment
#   make wheels   wheels in dist/ without CUDA, for all supported releases of torch and every Python that is here;
#                 fewer by: make wheels PYTHONS=python3.12 TORCHES="2.13 2.14"
#   make cuda     build the CUDA side against a CUDA torch, in an environment of its own; needs nvcc, no GPU
#
# To use an environment that is already there, with torch and what the target needs, name its Python. Nothing is
# installed then, and the extension is built in place:
#
#   make test ENV=python3

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_CUDA ?= torch==2.11.0
PYTHONS ?= python3.11 python3.12 python3.13
TORCHES ?= 2.11 2.12 2.13 2.14 2.15
export PYTHONPATH := $(CURDIR)

ifdef ENV
python := $(ENV)
peers_python := $(ENV)
else
python := .venv/bin/python
environment := .venv/installed
peers_python := .venv-peers/bin/python
peers_environment := .venv-peers/installed
export PATH := $(CURDIR)/.venv/bin:$(PATH)
endif

# On all cores, each file on one of them. Threads that wait must not keep those of another process from working.
pytest = OMP_WAIT_POLICY=passive $(python) -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

cpp = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-all test-slow mutants test-integrations lint format bench bench-peers bench-integrations docs extension wheel wheels cuda clean

demo: extension
	$(python) benchmarks/steps.py --only seed@64 rl@1 rl@64 tabular@128 --no-compile
	$(python) benchmarks/train.py

test: extension
	$(pytest)

test-all: extension
	$(pytest) -m ""

test-slow: extension
	$(pytest) -m slow

mutants: extension
	$(python) tests/mutants.py

test-integrations: extension .venv-integrations/installed
	.venv-integrations/bin/python -m pytest tests/integrations

lint: $(environment)
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy
	clang-format --dry-run -Werror $(cpp)

format: $(environment)
	$(python) -m ruff check --fix
	$(python) -m ruff format
	clang-format -i $(cpp)

bench: extension
	$(python) benchmarks/train.py --output benchmarks/results
	$(python) benchmarks/kernels.py
	$(python) benchmarks/steps.py
	$(python) benchmarks/habits.py
	$(python) benchmarks/training.py
	$(python) benchmarks/ensemble.py
	$(python) benchmarks/readme.py

bench-peers: extension $(peers_environment)
	$(peers_python) benchmarks/peers.py
	$(peers_python) benchmarks/inference.py
	$(python) benchmarks/readme.py

bench-integrations: extension .venv-integrations/installed
	.venv-integrations/bin/python benchmarks/integrations.py

docs: .venv-docs/installed
	.venv-docs/bin/python -m mkdocs build --strict

extension: $(environment)
	$(python) setup.py --quiet build_ext --inplace

wheel: $(environment)  # for the GPUs of others: none is in sight
	CUDA_VISIBLE_DEVICES= $(python) -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

wheels: export TORCHES := $(TORCHES)
wheels: export PYENV_VERSION = $(shell pyenv versions --bare 2>/dev/null | paste -sd:)  # or it would show one Python
wheels:
	set -e; for python in $(PYTHONS); do \
		$$python --version || continue; \
		environment=.venv-wheels-$$python folder=build/wheels/$$python; \
		$(MAKE) PYTHON=$$python $$environment/installed; \
		rm -rf $$folder/dist; \
		$$environment/bin/python -W ignore wheels.py --quiet build --build-base $$folder bdist_wheel --dist-dir $$folder/dist; \
		PATH="$(CURDIR)/$$environment/bin:$$PATH" auditwheel repair --wheel-dir dist \
			--exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude 'libgomp*' $$folder/dist/*.whl; \
	done

cuda: .venv-cuda/installed
	FASTMLP_CUDA=1 .venv-cuda/bin/python setup.py --quiet build --build-base build/cuda --build-lib build/cuda/lib
	cd build/cuda/lib && PYTHONPATH= $(CURDIR)/.venv-cuda/bin/python -m fastmlp

.venv/installed: packages := '$(TORCH)' --group build --group test --group lint
.venv-peers/installed: packages := '$(TORCH)' --group peers
.venv-cuda/installed: packages := '$(TORCH_CUDA)' --group build --group test
.venv-integrations/installed: packages := '$(TORCH)' --group integrations
.venv-docs/installed: packages := --group docs
.venv-wheels-%/installed: packages := --group wheels
environments := .venv $(foreach name,peers cuda integrations docs $(PYTHONS:%=wheels-%),.venv-$(name))
$(environments:%=%/installed): pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'  # the first to know dependency groups
	$(@D)/bin/python -m pip install $(packages)
	touch $@

clean:
	rm -rf build dist *.egg-info .venv .venv-* fastmlp/*.so
