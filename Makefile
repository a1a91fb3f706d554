PYTHON ?= python
JOBS ?= 2
# -P keeps the current folder off sys.path, so the rooms are found as dwindle.* or not at all
RUN = $(PYTHON) -P -m

.PHONY: check format test-all demo wheel clean

check:
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) pytest -n $(JOBS) -m "not slow"

format:
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

test-all:
	$(RUN) pytest -n $(JOBS)

demo:
	$(RUN) dwindle demo

wheel: clean
	$(RUN) build

clean:
	rm -rf build dist dwindle.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +
