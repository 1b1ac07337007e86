# Every target sets up what it needs. `make` alone lists them.

PYTHON ?= python3
PORT   ?= 50051
BIN    := .venv/bin
SOURCES := src/chat_ticket_svc scripts tests

.DEFAULT_GOAL := help
.PHONY: help venv run test migrate migrate-status new-migration proto check-proto lint format typecheck check demo lock clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "  make %-15s %s\n", $$1, $$2 }'

venv: ## create .venv from requirements.lock, when it is not up to date
	@$(PYTHON) scripts/bootstrap.py

run: venv ## serve on PORT=50051 with an embedded PostgreSQL in .data, migrated
	@$(BIN)/chat-ticket-svc serve --port $(PORT) --embedded .data/postgres

test: venv ## run the tests; ARGS= goes to pytest
	@$(BIN)/python -m pytest $(ARGS)

migrate: venv ## bring the database of DATABASE_URL to the newest schema
	@$(BIN)/chat-ticket-svc migrate

migrate-status: venv ## list the applied and the pending migrations of DATABASE_URL
	@$(BIN)/chat-ticket-svc migrate-status

new-migration: venv ## create an empty migration: NAME=add_something
	@test -n "$(NAME)" || { echo "usage: make new-migration NAME=add_something"; exit 2; }
	@$(BIN)/dbmate --migrations-dir migrations new "$(NAME)"

proto: venv ## generate the stubs in src/chat_ticket/v1 from protos
	@$(BIN)/python scripts/generate_stubs.py

check-proto: venv ## fail unless the committed stubs are what the protos generate
	@$(BIN)/python scripts/generate_stubs.py --check

lint: venv ## check the style of Python, protos and migrations
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/buf lint protos
	@$(BIN)/buf format --diff --exit-code protos
	@$(BIN)/squawk --config migrations/.squawk.toml migrations/*.sql

format: venv ## format Python and protos
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)
	@$(BIN)/buf format --write protos

typecheck: venv ## mypy --strict over src and scripts
	@$(BIN)/mypy

check: lint typecheck check-proto test ## all that CI runs

demo: venv ## load real conversations through the API and show what the service does; ALL=1 for every chat
	@$(BIN)/python scripts/demo.py $(if $(ALL),--all)

lock: venv ## resolve requirements.lock again from pyproject.toml
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/uv pip compile --quiet --upgrade --universal --generate-hashes --python-version 3.11 \
		--all-extras --group dev --custom-compile-command "make lock" \
		--output-file requirements.lock pyproject.toml

clean: ## remove what the targets made: .venv, .data and caches
	@rm -rf .venv .data .bootstrap.lock .mypy_cache .pytest_cache .ruff_cache .hypothesis dist tests/node/node_modules
	@find src scripts tests -name __pycache__ -type d -exec rm -rf {} +
