# Makes or reuses the virtual environment and installs the project. Sourced by the other scripts; leaves $PYTHON set.
# EXTRAS names optional dependencies to install too, as EXTRAS=test.
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$project/.venv}
PYTHON=$venv/bin/python

if [ ! -x "$PYTHON" ]; then
    for candidate in python3.12 python3.11 python3; do
        if "$candidate" -c 'import sys; sys.exit(not sys.version_info >= (3, 11))' 2>/dev/null; then
            "$candidate" -m venv "$venv"
            break
        fi
    done
    [ -x "$PYTHON" ] || { echo "error: Python 3.11 or newer was not found" >&2; exit 2; }
fi
# Installed once for each state of pyproject.toml: a second run starts at once.
stamp=$venv/.installed-$(cat "$project/pyproject.toml" <(echo "${EXTRAS:-}") | cksum | tr ' ' -)
if [ ! -e "$stamp" ]; then
    echo "installing into $venv (PyTorch is large: a few minutes the first time)"
    bar=off # a log gets plain lines
    [ ! -t 1 ] || bar=on
    "$PYTHON" -m pip install --progress-bar "$bar" --disable-pip-version-check -e "$project${EXTRAS:+[$EXTRAS]}"
    touch "$stamp"
fi
export TOKENIZERS_PARALLELISM=false LDM_SCRIPTED=1 # a script knows the next step: the doors need not tell it
export PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH} # of checkouts that share an environment, each runs its own code

absolute() { # a path as seen from here, for after a `cd`
    case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac
}

root_and_output() { # `root_and_output "what --root is" "$@"`: both paths, which a recipe needs, as $root and $out
    local usage="usage: $0 --root $1 --output DIR"
    shift
    root= out=
    while [ $# -gt 0 ]; do
        case $1 in
            --root) root=$(absolute "$2"); shift 2 ;;
            --output) out=$(absolute "$2"); shift 2 ;;
            *) echo "error: unknown argument $1; $usage" >&2; exit 2 ;;
        esac
    done
    [ -n "$root" ] && [ -n "$out" ] || { echo "$usage" >&2; exit 2; }
}

run() { # print a command, then run it
    echo "+ python ${*/#$project\//}"
    "$PYTHON" "$@"
}
