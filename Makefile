# `make run` and `make test` are all a newcomer needs; both set up what is missing first.
.PHONY: help run test acceptance check bench clean setup setup-dev

help:
	@echo "make run         the ingress gateway on examples/storefront, until Ctrl-C"
	@echo "make test        all checks and tests"
	@echo "make acceptance  the Gateway API cases of ../shared against a gateway and a lab"
	@echo "make check       formatting, lint, types, import layers"
	@echo "make bench       how long route changes take, and how much memory routes need"
	@echo "make clean       remove what was built, .venv included"

setup:
	@scripts/setup.sh run

setup-dev:
	@scripts/setup.sh dev

run: setup
	@exec .venv/bin/python examples/storefront/run.py

check: setup-dev
	@mkdir -p build
	@echo "check: ruff" && .venv/bin/ruff check -q .
	@.venv/bin/ruff format -q --check . || { echo "format with: .venv/bin/ruff format" >&2; exit 1; }
	@echo "check: mypy --strict" && .venv/bin/mypy
	@echo "check: import layers"
	@.venv/bin/lint-imports --no-logo >build/imports.txt 2>&1 || { cat build/imports.txt >&2; exit 1; }
	@echo "check: module list" && .venv/bin/python scripts/modules.py --check

test: check
	@.venv/bin/pytest --cov --cov-report=term:skip-covered --durations=5

acceptance: setup-dev
	@PYTHONPATH=tests .venv/bin/python -m acceptance $(ARGS)

bench: setup-dev
	@.venv/bin/python tests/bench_routes.py $(ARGS)

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache .coverage examples/storefront/*.generated.* \
		examples/storefront/manifests/*.generated.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
