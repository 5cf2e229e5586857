PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# pip with the constraints file, for what is installed and for what builds the project: every version stands there.
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/pip --disable-pip-version-check install --quiet

.PHONY: demo test docs test-cluster test-crash test-integrations test-torch lab-speed clean

demo: $(VENV)/lab
	$(BIN)/relaxprop reproduce demo --batched-seeds

test: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --dist worksteal

# The site, in docs/_build/html. Nothing is fetched; a warning, a notebook that fails or a link that leads nowhere ends it.
docs: $(VENV)/docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --fresh-env --builder html docs docs/_build/html
	$(BIN)/python docs/check_links.py docs/_build/html

# The tools that the wrapper is tried in, a part of the tests above. The outcome is kept under results/works-with.
test-integrations: $(VENV)/test
	$(BIN)/pytest tests/integrations tests/test_transparent.py --outcome=results/works-with/outcome.json

# The engine on a Ray cluster that the tests start on this machine.
test-cluster: $(VENV)/test
	$(PIP) --editable '.[cluster]'
	$(BIN)/pytest tests/lab/test_cluster.py

# A grid on two workers, of which one or all are killed, 50 times. The outcome is kept under results/crash.
test-crash: $(VENV)/test
	$(BIN)/python results/crash/kill.py --kills 50 --out results/crash/outcome.json

# What the lab's workers, engines and commands cost. The outcome is kept under results/lab-speed.
lab-speed: $(VENV)/test
	$(BIN)/python results/lab-speed/measure.py

# The library's tests on another version of PyTorch, in an environment of its own:  make test-torch TORCH=2.7.1
# The outcome is kept under results/torch-versions. An environment takes 6 GB: delete it afterwards.
TORCH_VENV = .venv-torch-$(TORCH)

test-torch: $(TORCH_VENV)/installed
	$(TORCH_VENV)/bin/pytest tests --ignore=tests/lab --outcome=results/torch-versions/$(TORCH).json

# PyTorch pins some of the packages that it needs itself: for those the constraints file does not hold.
$(TORCH_VENV)/installed: pyproject.toml constraints.txt
	$(if $(TORCH),,$(error name a version of PyTorch, as in  make test-torch TORCH=2.7.1))
	$(PYTHON) -m venv $(TORCH_VENV)
	grep -vE '^(torch|sympy|setuptools|triton)==' constraints.txt > $(TORCH_VENV)/constraints.txt
	@echo "Installing PyTorch $(TORCH) into $(TORCH_VENV) (some minutes) ..."
	PIP_CONSTRAINT=$(TORCH_VENV)/constraints.txt $(TORCH_VENV)/bin/pip --disable-pip-version-check install --quiet \
		torch==$(TORCH) --editable '.[test]'
	touch $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("relaxprop needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": name one, as in  make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/lab: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing relaxprop into $(VENV) (some minutes the first time) ..."
	$(PIP) --editable '.[lab]'
	touch $@

$(VENV)/test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing relaxprop and its test tools into $(VENV) (some minutes the first time) ..."
	$(PIP) --editable '.[test]'
	touch $@ $(VENV)/lab

$(VENV)/docs: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing relaxprop and what makes its site into $(VENV) (some minutes the first time) ..."
	$(PIP) --editable '.[docs]'
	touch $@

clean:
	rm -rf docs/_build docs/generated $(VENV) .venv-torch-* .mypy_cache .pytest_cache .ruff_cache dist
