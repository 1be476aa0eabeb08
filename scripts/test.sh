#!/usr/bin/env bash
# The whole test suite: makes or reuses the environment, installs what tests need. Arguments go to pytest.
set -euo pipefail
case " $* " in *browser* | *docs* | *onnx*) needed=test,browser,dev,export ;; *) needed=test ;; esac
export EXTRAS=${EXTRAS:-$needed}
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$project"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tiny models: more threads only wait for each other
case " $* " in # two processes share the tests, but not where these are few, or are counted or looked at by the caller
*.py* | *" -m many"* | *" -n"* | *" --numprocesses"* | *" --dist"* | *" --pdb "* | *"no:xdist "*) ;;
*) set -- -n 2 --dist worksteal "$@" ;;
esac
exec "$PYTHON" -m pytest "$@"
