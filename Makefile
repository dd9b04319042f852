# Both commands are complete on a fresh machine with Python 3.11 or newer and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test proofs chaos fuzz

demo: .venv/installed ## set up, then train on handwritten digits, on two CPU cores in a few minutes
	$(BIN)/python training/train_ldm.py --config training/configs/digits.yaml

test: .venv/installed ## set up, then run all tests, two files at once
	$(BIN)/ruff check .
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

proofs: .venv/installed ## the longer tests: two processes and one, sharded and whole
	$(BIN)/python -m pytest -m slow -s

chaos: .venv/installed ## kill the tiny run everywhere, fill its disk, and compare what is left (Linux, 10 minutes)
	$(BIN)/python tests/chaos.py

fuzz: .venv/installed ## try broken images, data sets, configurations and models, and count what happens
	$(BIN)/python tests/fuzz.py

# The tested versions: an open range could install another torch, and gigabytes with it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
