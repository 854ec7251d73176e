# Everything runs in .venv, made from constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
COMPAT_PYTHON ?= $(firstword $(shell python3.13 -c 'import sys; print(sys.executable)' 2>&-) \
  $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python3) $(PYTHON))
COMPAT_TESTS := $(addprefix tests/test_, $(addsuffix .py, api archives checkpoint data evaluation \
  golden loop metrics model moments notebook optimizer runtime steps stopping stream))
PEERS := torch==2.13.0 tensorflow-cpu==2.21.0 keras==3.15.1 scipy

.PHONY: train test test-all compat lint bench determinism demo page docs clean

train: .venv/installed
	$(BIN)/python experiments/train.py

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What takes longer, too; nothing is skipped where Chromium and Debian's dataset-fashion-mnist are.
test-all: .venv/all
	MNIST_FLAX_TEST_ALL=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
	  -m "slow or not slow"

# The oldest and the newest versions of what the package stands on, with Python 3.13 if it is there.
compat: .venv-oldest/installed .venv-newest/installed
	for versions in oldest newest; do \
	  .venv-$$versions/bin/python -m pytest -n 2 --dist loadfile $(COMPAT_TESTS) || exit 1; \
	done

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

demo: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	$(BIN)/python experiments/demo.py

# The demo as static files, which need no server of their own.
page: .venv/installed
	rm -rf build/page
	$(BIN)/python experiments/page.py --out build/page
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory build/page

determinism: .venv/installed
	$(BIN)/python experiments/determinism.py

bench: .venv/installed .venv-peers/installed
	$(BIN)/python experiments/benchmark.py --peers .venv-peers/bin/python

# The pages of docs/ and the docstrings as a site, build/site; a broken link is an error.
docs: .venv-docs/installed
	.venv-docs/bin/mkdocs build --strict --quiet

.venv-docs/installed: Makefile
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet mkdocs==1.6.1 'mkdocstrings[python]==1.0.8'
	touch $@

# PyTorch and Keras, to be compared with; the package needs neither.
.venv-peers/installed: Makefile
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet $(PEERS)
	touch $@

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,export,lint]'
	touch $@

.venv-oldest/installed .venv-newest/installed: .venv-%/installed: pyproject.toml compat/%.txt
	$(COMPAT_PYTHON) -c 'import sys; sys.version_info >= (3, 12) or \
	  sys.exit("jax 0.12 needs Python 3.12 or later: make compat COMPAT_PYTHON=python3.13")'
	$(COMPAT_PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --constraint compat/$*.txt --editable '.[test]'
	touch $@

.venv/all: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,export,lint,demo,fuzz,wandb]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt playwright optuna
	touch $@

clean:
	rm -rf .venv .venv-docs .venv-peers .venv-oldest .venv-newest
