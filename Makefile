PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# pip with the constraints file, for what is installed and for what builds the project: every version stands there.
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/pip --disable-pip-version-check install --quiet

.PHONY: demo test lint clean

demo: $(VENV)/lab
	$(BIN)/relaxprop reproduce demo

test: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

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

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache dist
