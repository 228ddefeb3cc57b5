#!/usr/bin/env bash
# Run all tests. Options pass through to pytest: ./scripts/test.sh -k layout -x
set -euo pipefail
source "$(dirname "$0")/environment.sh"
helix_environment test
exec python -m pytest "$@"
