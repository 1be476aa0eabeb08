#!/usr/bin/env bash
# The whole test suite: makes or reuses the environment, installs what tests need. Arguments go to pytest.
set -euo pipefail
export EXTRAS=${EXTRAS:-test}
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$project"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} # tiny models: more threads only wait for each other
exec "$PYTHON" -m pytest "$@"
