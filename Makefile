# make demo     a fresh machine to a talking model: environment, sample corpus, tokenizer, pretraining, export, text
# make test     environment and the whole test suite
# make test-long  what takes minutes on many processes: eight-process layouts, all pairs of layouts
# make install  the environment alone, in .venv/
#
# PYTHON=python3.12 chooses the interpreter, PIP_ARGS="--index-url ..." another package index (e.g. torch's CPU wheels).

PYTHON   ?= python3
PIP_ARGS ?=
VENV     := .venv
BIN      := $(VENV)/bin
STAMP    := $(VENV)/.installed

.PHONY: install demo test test-long

install: $(STAMP)

# torch comes first, so that nothing else decides which build of it is installed; DeepSpeed compiles nothing.
$(STAMP): pyproject.toml constraints.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt torch setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt --editable '.[all,test]'
	touch $(STAMP)

test: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m "not long"

test-long: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m long

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh
