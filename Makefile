# Every target sets up what it needs. `make` alone lists them.

BIN    := .venv/bin
# An environment that is there keeps its Python, unless another is named.
PYTHON ?= $(or $(wildcard $(BIN)/python3),python3)
SOURCES := src examples scripts benchmarks tests

.DEFAULT_GOAL := help
.PHONY: help venv venv-bench venv-docs run test test-pgbouncer fuzz faults faults-quick failover soak scaling migrate migrate-status new-migration proto check-proto check-breaking lint format typecheck check demo docs bench lock audit clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "  make %-15s %s\n", $$1, $$2 }'

venv: ## create .venv from requirements.lock, when it is not up to date
	@$(PYTHON) scripts/bootstrap.py

venv-bench: venv ## create .venv-bench from benchmarks/requirements.lock, for make bench
	@$(BIN)/python scripts/bootstrap.py .venv-bench

run: venv ## serve on PORT= or 50051, with an embedded PostgreSQL in .data; AUTH=jwt asks for tokens
	@$(if $(AUTH),CHAT_TICKET_AUTH=$(AUTH)) $(BIN)/chat-ticket-svc serve $(if $(PORT),--port $(PORT)) --embedded .data/postgres

test: venv ## run the tests; ARGS= goes to pytest
	@$(BIN)/python -m pytest $(ARGS)

test-pgbouncer: venv ## run them with PgBouncer before PostgreSQL; it is Debian's package
	@TEST_PGBOUNCER=1 $(BIN)/python -m pytest $(ARGS)

fuzz: venv ## send 100,000 hostile requests, and as often bytes that are none; N= for as many, SEED= to repeat
	@$(BIN)/python tests/hostile_run.py $(if $(N),--count $(N)) $(if $(SEED),--seed $(SEED))

faults: venv ## break the service in every way of the matrix, for an hour; ARGS="--only cut --runs 2" for less
	@PYTHONPATH=tests $(BIN)/python -m faults $(ARGS)

failover: venv ## promote a standby under load, in every way; ARGS="--only killed --runs 5" for some of them
	@PYTHONPATH=tests $(BIN)/python -m faults.failover $(ARGS)

scaling: venv ## measure PgBouncer, nginx and sizes for docs/scaling.md; PARTS="size" chooses, ROUNDS=
	@PYTHONPATH=tests:. $(BIN)/python tests/scaling_run.py $(PARTS) $(if $(ROUNDS),--rounds $(ROUNDS))

soak: venv ## an hour of ordinary work, after which nothing has grown; ARGS="--minutes 5" for less
	@PYTHONPATH=tests $(BIN)/python -m faults.soak $(ARGS)

faults-quick: venv ## the part of it that the tests make
	@$(BIN)/python -m pytest tests/faults

migrate: venv ## bring the database of DATABASE_URL to the newest schema
	@$(BIN)/chat-ticket-svc migrate

migrate-status: venv ## list the applied and the pending migrations of DATABASE_URL
	@$(BIN)/chat-ticket-svc migrate-status

new-migration: venv ## create an empty migration: NAME=add_something
	@test -n "$(NAME)" || { echo "usage: make new-migration NAME=add_something"; exit 2; }
	@$(BIN)/dbmate --migrations-dir migrations new "$(NAME)"
	@file=$$(ls migrations/*_"$(NAME)".sql | tail -n 1); \
		{ sed '/^-- migrate:down/,$$d' "$$file"; printf '%s\n\n' "SET LOCAL lock_timeout = '5s';" "-- migrate:down"; } \
		> "$$file.new" && mv "$$file.new" "$$file"

proto: venv ## generate the stubs from protos, and the synchronous client from the asyncio one
	@$(BIN)/python scripts/generate_stubs.py
	@$(BIN)/python scripts/generate_sync_client.py

check-proto: venv ## fail unless the committed stubs and synchronous client are what is generated
	@$(BIN)/python scripts/generate_stubs.py --check
	@$(BIN)/python scripts/generate_sync_client.py --check

# Where the history is missing, as in a shallow clone, there is nothing to compare with.
AGAINST ?= $(shell git describe --tags --abbrev=0 2>/dev/null || git rev-parse --verify --quiet HEAD~1)
check-breaking: venv ## fail when the protos break callers of the last tag, or else the last commit; AGAINST= another
	@test -n "$(AGAINST)" || { echo "nothing to compare the protos with: no tag, no commit before"; exit 0; }; \
		$(BIN)/buf breaking protos --against '.git#ref=$(AGAINST),subdir=protos'

lint: venv ## check the style of Python, protos, the Containerfile and migrations
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/buf lint protos
	@$(BIN)/buf format --diff --exit-code protos
	@$(BIN)/hadolint Containerfile
	@for file in migrations/*.sql; do \
		sed '/^-- migrate:down/,$$d' "$$file" \
		| $(BIN)/squawk --config migrations/.squawk.toml --stdin-filepath "$$file" || exit 1; done

format: venv ## format Python and protos
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)
	@$(BIN)/buf format --write protos

typecheck: venv ## mypy --strict over all but the tests
	@$(BIN)/mypy

check: lint typecheck check-proto check-breaking test ## all that CI runs

demo: venv ## load real conversations through the API and show what the service does; ALL=1 for every chat
	@$(BIN)/python scripts/demo.py $(if $(ALL),--all)

bench: venv-bench ## measure against limits and peers, in 15 minutes; PARTS="calls streams" chooses, ROUNDS=
	@PARTS="$(PARTS)" ROUNDS="$(ROUNDS)" $(BIN)/python -m benchmarks.bench

venv-docs: venv ## create .venv-docs from docs/requirements.lock, for make docs
	@$(BIN)/python scripts/bootstrap.py .venv-docs

docs: venv-docs ## make the reference of the API in build/docs/chat_ticket.v1.html
	@mkdir -p build/docs
	@$(BIN)/buf build protos --output build/docs/descriptor.pb
	@cd docs && ../.venv-docs/bin/sabledocs > ../build/docs/log

COMPILE := $(BIN)/uv pip compile --quiet --universal --generate-hashes \
	--python-version 3.11 --custom-compile-command "make lock" --no-emit-package chat-ticket-client

lock: venv ## resolve the locks again from pyproject.toml: of all, of what is installed to serve and to build, of the client, of the docs and of the benchmark
	@$(COMPILE) --upgrade --all-extras --group dev --output-file requirements.lock pyproject.toml
	@$(COMPILE) --constraint requirements.lock --extra tracing --output-file requirements-service.lock pyproject.toml
	@$(COMPILE) --constraint requirements.lock --group build --output-file requirements-build.lock
	@$(COMPILE) --constraint requirements.lock --output-file clients/python/requirements.lock clients/python/pyproject.toml
	@$(COMPILE) --upgrade --output-file docs/requirements.lock docs/requirements.in
	@$(COMPILE) --upgrade --output-file benchmarks/requirements.lock benchmarks/requirements.in

audit: venv ## look the locked dependencies up in PyPI's database of vulnerabilities
	@$(BIN)/python scripts/audit.py

clean: ## remove what the targets made: .venv, .venv-bench, .data, build and caches
	@rm -rf .venv .venv-bench .venv-docs .data build .bootstrap.lock .mypy_cache .pytest_cache .ruff_cache .hypothesis dist tests/node/node_modules examples/node/node_modules
	@find src scripts benchmarks tests -name __pycache__ -type d -exec rm -rf {} +
