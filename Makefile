# Every target sets up what it needs. `make` alone lists them.

BIN    := .venv/bin
# An environment that is there keeps its Python, unless another is named.
PYTHON ?= $(or $(wildcard $(BIN)/python3),python3)
SOURCES := src examples scripts benchmarks tests

.DEFAULT_GOAL := help
.PHONY: help venv venv-bench venv-docs run test test-pgbouncer fuzz faults faults-quick failover soak scaling node-client migrate migrate-status new-migration proto check-proto check-breaking reference check-reference lint format typecheck check demo docs bench lock audit clean

help: ## list the targets
	@awk -F ':.*## ' '/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

##@ To use the service

# env, as an assignment before the command would start a shell, which keeps signals to itself.
run: venv ## serve on PORT= or 50051, with an embedded PostgreSQL in .data; AUTH=jwt requires tokens
	@$(if $(AUTH),env CHAT_TICKET_AUTH=$(AUTH)) $(BIN)/chat-ticket-svc serve $(if $(PORT),--port $(PORT)) --embedded .data/postgres

demo: venv ## load real conversations through the API and show what the service does; ALL=1 loads every one
	@$(BIN)/python scripts/demo.py $(if $(ALL),--all)

docs: venv-docs ## build the site of the documentation in build/docs, or SITE=; open its index.html from disk
	@log=$$(.venv-docs/bin/mkdocs build $(if $(SITE),--site-dir $(SITE)) 2>&1) || { echo "$$log"; exit 1; }

node-client: ## build the npm package of clients/node, as build/chat-ticket-client-*.tgz
	@mkdir -p build
	@cd clients/node && npm ci && npm run build && npm pack --silent --pack-destination ../../build

##@ To operate it: these work on the database of DATABASE_URL

migrate: venv ## bring the database to the newest schema
	@$(BIN)/chat-ticket-svc migrate

migrate-status: venv ## list the applied and the pending migrations
	@$(BIN)/chat-ticket-svc migrate-status

##@ To change it

# What to do when a part of `make check` fails.
HINT_lint := make format mends the layout; the rule in the message says what is wrong otherwise
HINT_typecheck := mypy names the line; generated stubs are made by make proto
HINT_check-proto := run make proto, and commit the files that it generates
HINT_check-breaking := protos only grow: add a field with a new number, and keep the old one
HINT_check-reference := run make reference, and commit the files that it generates
HINT_test := make test ARGS="FILE -k NAME" repeats one test; add -n 0 to see its output at once

CHECKS := lint typecheck check-proto check-breaking check-reference test
check: venv ## run all that CI runs, and say what to do when a part fails
	@$(foreach part,$(CHECKS),$(MAKE) --no-print-directory $(part) \
		|| { printf '\nmake check: %s failed. %s.\n' "$(part)" '$(HINT_$(part))'; exit 1; };)

test: venv ## run the tests; ARGS= goes to pytest
	@$(BIN)/python -m pytest $(ARGS)

lint: venv ## check the style of Python, protos, the Containerfile and migrations
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/buf lint protos
	@$(BIN)/buf format --diff --exit-code protos
	@$(BIN)/hadolint Containerfile
	@for file in migrations/*.sql; do \
		sed '/^-- migrate:down/,$$d' "$$file" \
		| $(BIN)/squawk --config .squawk.toml --stdin-filepath "$$file" || exit 1; done

typecheck: venv ## run mypy --strict over everything but the tests
	@$(BIN)/mypy

format: venv ## format Python and protos
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)
	@$(BIN)/buf format --write protos

proto: venv ## generate the stubs from protos, and the synchronous client from the asyncio one
	@$(BIN)/python scripts/generate_stubs.py
	@$(BIN)/python scripts/generate_sync_client.py

check-proto: venv ## fail unless the committed stubs and synchronous client match their sources
	@$(BIN)/python scripts/generate_stubs.py --check
	@$(BIN)/python scripts/generate_sync_client.py --check

reference: venv ## generate docs/reference from the settings, errors, metrics, commands and protos
	@$(BIN)/python scripts/generate_reference.py

check-reference: venv ## fail unless docs/reference is what these generate
	@$(BIN)/python scripts/generate_reference.py --check

# Where the history is missing, as in a shallow clone, there is nothing to compare with.
check-breaking: AGAINST ?= $(shell git describe --tags --abbrev=0 2>/dev/null || git rev-parse --verify --quiet HEAD~1)
check-breaking: venv ## fail when the protos break callers of the last tag, or of the last commit; AGAINST= another
	@test -n "$(AGAINST)" || { echo "nothing to compare the protos with: no tag, no commit before"; exit 0; }; \
		$(BIN)/buf breaking protos --against '.git#ref=$(AGAINST),subdir=protos'

new-migration: venv ## create an empty migration: NAME=add_something
	@test -n "$(NAME)" || { echo "usage: make new-migration NAME=add_something"; exit 2; }
	@$(BIN)/dbmate --migrations-dir migrations new "$(NAME)"
	@file=$$(ls migrations/*_"$(NAME)".sql | tail -n 1); \
		{ sed '/^-- migrate:down/,$$d' "$$file"; printf '%s\n\n' "SET LOCAL lock_timeout = '5s';" "-- migrate:down"; } \
		> "$$file.new" && mv "$$file.new" "$$file"

COMPILE := $(BIN)/uv pip compile --quiet --universal --generate-hashes \
	--python-version 3.11 --custom-compile-command "make lock" --no-emit-package chat-ticket-client

lock: venv ## resolve the lock files again from pyproject.toml
	@$(COMPILE) --upgrade --all-extras --group dev --output-file requirements.lock pyproject.toml
	@$(COMPILE) --constraint requirements.lock --extra tracing --output-file requirements-service.lock pyproject.toml
	@$(COMPILE) --constraint requirements.lock --group build --output-file requirements-build.lock
	@$(COMPILE) --constraint requirements.lock --output-file clients/python/requirements.lock clients/python/pyproject.toml
	@$(COMPILE) --upgrade --output-file docs/requirements.lock docs/requirements.in
	@$(COMPILE) --upgrade --output-file benchmarks/requirements.lock benchmarks/requirements.in

##@ To measure it, and to break it on purpose

bench: venv-bench ## measure against limits and peers, in 40 minutes; PARTS="calls streams" chooses, ROUNDS=; AGAINST= a commit
	@PARTS="$(PARTS)" ROUNDS="$(ROUNDS)" AGAINST="$(AGAINST)" $(BIN)/python -m benchmarks.bench

scaling: venv ## measure PgBouncer, nginx and sizes for docs/scaling.md; PARTS="size" chooses, ROUNDS=
	@PYTHONPATH=tests $(BIN)/python -m benchmarks.scaling $(PARTS) $(if $(ROUNDS),--rounds $(ROUNDS))

fuzz: venv ## send 100,000 hostile requests, and as many malformed ones; N= sets how many, SEED= repeats a run
	@PYTHONPATH=tests $(BIN)/python -m fuzz $(if $(N),--count $(N)) $(if $(SEED),--seed $(SEED))

faults: venv ## run every fault of the matrix, for an hour; ARGS="--only cut --runs 2" for a part
	@PYTHONPATH=tests $(BIN)/python -m faults $(ARGS)

faults-quick: venv ## run the faults that the tests include
	@$(BIN)/python -m pytest tests/faults

failover: venv ## promote a standby under load; ARGS="--only killed --runs 5" for a part
	@PYTHONPATH=tests $(BIN)/python -m faults.failover $(ARGS)

soak: venv ## work for an hour and check that nothing has grown; ARGS="--minutes 5" for less
	@PYTHONPATH=tests $(BIN)/python -m faults.soak $(ARGS)

test-pgbouncer: venv ## run the tests through PgBouncer, Debian's package
	@TEST_PGBOUNCER=1 $(BIN)/python -m pytest $(ARGS)

audit: venv ## look the locked dependencies up in PyPI's vulnerability database
	@$(BIN)/python scripts/audit.py

##@ Environments, which the other targets set up themselves

venv: ## create .venv from requirements.lock, unless it is up to date
	@$(PYTHON) scripts/bootstrap.py

venv-bench: venv ## create .venv-bench from benchmarks/requirements.lock
	@$(BIN)/python scripts/bootstrap.py .venv-bench

venv-docs: venv ## create .venv-docs from docs/requirements.lock
	@$(BIN)/python scripts/bootstrap.py .venv-docs

clean: ## remove everything that the targets made
	@rm -rf .venv .venv-bench .venv-docs .data build .bootstrap.lock .mypy_cache .pytest_cache .ruff_cache .hypothesis dist clients/node/node_modules clients/node/dist tests/support/node/node_modules
	@find src scripts benchmarks tests -name __pycache__ -type d -exec rm -rf {} +
