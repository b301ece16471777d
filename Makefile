# make demo   sets everything up and runs the whole DAG on a family of tiny models
# make test   sets everything up and runs ruff, the contract of the imports, mypy and the tests
# make coverage   runs the tests of lewis/ and checks that they go through at least 90 % of its lines: to count takes a quarter
#             of the time that they take
# make faults is tests/faults in full: ten thousand inputs for each fuzzer, where make test has 60; runs and the
#             service killed at fifty points, races, full disks, servers that are away: hours. LEWIS_FAULTS_POINTS=12 is fewer;
#             what was stopped goes on, at the same commit
# make test-long  runs what takes longest: the service, the search, the demo and the pages in a browser; and all cases, such as
#             architectures and places of a kill, where make test has one of each kind
# make real   runs the DAG on the real SmolLM2-135M, its experts and data, where they are in ../shared: minutes
# make test-production  runs the service on real servers: PostgreSQL, S3, Prefect and MLflow with passwords, workers without
#             a shared disk; and kills them. Minutes; PostgreSQL is Debian's: apt install postgresql
# make test-serve  puts champions into service at a real vLLM, from the merge to the client: minutes. LEWIS_SERVE_VLLM is the
#             path of its program, in an environment of its own; without it, the one on the path
# make drill  two hours of operations of the service in fast motion, with what breaks in them
# make setup  only installs: a venv in .venv and this package, editable

PYTHON ?= python3
BIN := .venv/bin
# What is imported is compiled once and kept, also where the environment says otherwise: compiled each time, it takes a minute.
export PYTHONDONTWRITEBYTECODE :=
# Whose first import takes long; the setup does it, beside the compiling of the loops of the merge.
SLOW := datasets, lm_eval.evaluator, lm_eval.models.huggingface, matplotlib.pyplot, mlflow.pyfunc, mlflow.server.fastapi_app, \
	mlflow.store.model_registry.sqlalchemy_store, mlflow.store.tracking.sqlalchemy_store, mlflow.transformers, optuna, \
	prefect.cli, prefect.engine, prefect.server.api.server, prefect.workers.process, \
	transformers.models.auto.modeling_auto, transformers.models.auto.processing_auto, transformers.models.llama.modeling_llama

.PHONY: setup demo test types suite coverage real faults test-long test-production test-serve drill clean

setup: .venv/.installed

.venv/.installed: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: apt install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make setup PYTHON=python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "the venv module is missing: apt install python3-venv" >&2; exit 1; }
	$(BIN)/pip install -q --no-compile --disable-pip-version-check -e '.[dev]'
	@$(BIN)/python -m compileall -q lewis flows tasks
	@$(BIN)/python -c 'import lewis.merging.engine.kernels, lewis.inspection.loops' & loops=$$!; $(BIN)/python -W ignore -c 'import $(SLOW)' && wait $$loops
	@touch $@

demo: setup
	$(BIN)/lewis demo

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory -j 2 types suite  # the types are checked while tests wait

coverage: setup
	$(BIN)/pytest -n 4 --dist loadfile --cov=lewis --cov-fail-under=90 tests/lewis

types: setup
	nice $(BIN)/mypy

suite: setup
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=30

real: setup
	LEWIS_REAL=1 $(BIN)/pytest tests/flows/test_real.py

drill: setup
	LEWIS_DRILL=1 $(BIN)/pytest -s --timeout 3600 tests/flows/service/test_drill.py

faults: setup
	LEWIS_FAULTS_DRAWS=10000 LEWIS_FAULTS_POINTS=$${LEWIS_FAULTS_POINTS:-50} $(BIN)/pytest \
		-n 6 --dist loadgroup --no-loadscope-reorder --durations=60 --timeout 36000 tests/faults

test-long: setup
	LEWIS_LONG=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder --timeout 3600 -m long

test-serve: setup
	LEWIS_SERVE=1 $(BIN)/pytest -s --timeout 1800 tests/serve

test-production: setup
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dev,kubernetes,postgres,s3,production]'
	LEWIS_PRODUCTION=1 $(BIN)/pytest --timeout 1800 tests/production

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage
