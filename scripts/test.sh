#!/usr/bin/env bash
# Run the tests; docs/testing.md says what they prove. Options pass through to pytest.
#
#   ./scripts/test.sh                      the quick tier: every property
#   ./scripts/test.sh --full               every case at full length
#   ./scripts/test.sh --full-part serving  one part of the full tier beside the quick one
#   ./scripts/test.sh tests/core/test_layout.py -k uneven -x
set -euo pipefail
source "$(dirname "$0")/environment.sh"
helix_environment test
# Once, for the hundreds of processes that tests start, also where Python is told to write no bytecode.
python -m compileall -q helix_megatron tests
# Two workers, each with a pool of ranks of its own; a file stays with one.
case " $* " in
  *" tests/"* | *" -n "*) exec python -m pytest "$@" ;;
  *) exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 "$@" ;;
esac
