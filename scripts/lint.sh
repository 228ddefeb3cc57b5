#!/usr/bin/env bash
# Formatting, lint and types.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
helix_environment test
ruff format --check --quiet .
ruff check --quiet .
mypy
