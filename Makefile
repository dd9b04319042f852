# Both commands are complete on a fresh machine with Python 3.11 or newer and make.
PYTHON ?= python3
BIN := .venv/bin
ROOT := $(shell [ `id -u` = 0 ] || echo sudo)

.PHONY: demo test browser proofs chaos fuzz

demo: .venv/installed ## set up, then train on handwritten digits, on two CPU cores in a few minutes
	$(BIN)/python training/train_ldm.py --config training/configs/digits.yaml

test: .venv/installed ## set up, then run all tests, on two cores in a few minutes
	$(BIN)/ruff check .
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

browser: .venv/installed ## the page in a browser: install Debian's Chromium and Selenium, and run its tests
	command -v chromium && command -v chromedriver || \
		{ $(ROOT) apt-get update && $(ROOT) apt-get install --yes chromium chromium-driver; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[browser]"
	$(BIN)/python -m pytest tests/test_browser.py -m browser

proofs: .venv/installed ## the longer tests: one process and two, whole and sharded
	$(BIN)/python -m pytest -m slow -s

chaos: .venv/installed ## kill the tiny run everywhere, fill its disk, and compare what is left (Linux; long)
	$(BIN)/python tests/chaos.py

fuzz: .venv/installed ## try broken images and model folders, and count the outcomes
	HF_HUB_OFFLINE=1 TQDM_DISABLE=1 $(BIN)/python -W ignore tests/fuzz.py

# The tested versions: an open range could install another torch, and gigabytes with it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
