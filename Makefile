# `make run` and `make test` are all a newcomer needs; both set up what is missing first.
.PHONY: help run test coverage acceptance rotation faults torture matrix check bench clean setup setup-dev setup-bench

help:
	@echo "make run         a lab with examples/storefront in it, until Ctrl-C; as root"
	@echo "make test        all checks and tests"
	@echo "make coverage    the tests, and which lines they did not reach"
	@echo "make acceptance  the Gateway API cases of ../shared against a gateway and a lab"
	@echo "make rotation    certificates of 20 s, all replaced under load (a minute; as root)"
	@echo "make faults      the API server of a cluster away for minutes, and other faults that take long"
	@echo "make torture     many transfers between pods, through the proxies, every byte compared"
	@echo "make matrix      generated policies in a lab, every pair of pods asked, then changes under traffic"
	@echo "make check       formatting, lint, types, import layers"
	@echo "make bench       Weft beside Envoy, nginx and HAProxy; route changes, policies, memory (12 minutes)"
	@echo "make clean       remove what was built, .venv included"

setup:
	@scripts/setup.sh run

setup-dev:
	@scripts/setup.sh dev

run: setup
	@exec .venv/bin/python examples/storefront/run.py

setup-bench:
	@scripts/setup.sh bench

check: setup-dev
	@mkdir -p build
	@echo "check: ruff" && .venv/bin/ruff check -q .
	@.venv/bin/ruff format -q --check . || { echo "format with: .venv/bin/ruff format" >&2; exit 1; }
	@echo "check: mypy --strict" && .venv/bin/mypy
	@echo "check: import layers"
	@.venv/bin/lint-imports --no-logo >build/imports.txt 2>&1 || { cat build/imports.txt >&2; exit 1; }
	@echo "check: module list" && .venv/bin/python scripts/modules.py --check

test: check
	@.venv/bin/pytest --durations=5

# Apart from `test`: it makes tests of pure Python three times as slow.
coverage: check
	@.venv/bin/pytest --cov --cov-report=term:skip-covered

acceptance: setup-dev
	@PYTHONPATH=tests .venv/bin/python -m acceptance $(if $(SOURCE),--source $(SOURCE)) $(ARGS)

rotation: setup-dev
	@WEFT_TEST_SVID_LIFE=20s .venv/bin/pytest tests/test_lab_certs.py --durations=3

torture: setup-dev
	@WEFT_STRESS_S=60 .venv/bin/pytest -q tests/test_pairs_stress.py
	@WEFT_STRESS_S=3 .venv/bin/pytest -q tests/test_pairs_ended.py
	@PYTHONPATH=tests .venv/bin/python -m torture $(ARGS)

matrix: setup-dev
	@PYTHONPATH=tests .venv/bin/python -m matrix $(ARGS)

faults: setup-dev
	@.venv/bin/pytest -s tests/kubernetes_faults.py $(ARGS)

bench: setup-bench
	@PYTHONPATH=tests .venv/bin/python -m bench $(ARGS)

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache .coverage examples/storefront/*.generated.* \
		examples/storefront/manifests/*.generated.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
