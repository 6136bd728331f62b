# Finds a Python and builds the virtual environments of the other scripts. Sourced by them, bash only.
#
#   DIP_PYTHON     the interpreter to use (default: the first 3.12 or newer that answers, else 3.11)
#   DIP_VENV_DIR   where environments are kept (default: the repository)

set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV_DIR="${DIP_VENV_DIR:-$ROOT}"
MEGATRON=0.19.2       # newest release; its wheel brings megatron.training
MEGATRON_CORE=0.16.1  # newest release for Python 3.11; core only
BRIDGE=0.6.2          # newest release of Megatron-Bridge that goes with it; Python 3.12 only
SWIFT=4.6.0           # newest release of ms-swift, and of the models it trains
MCORE_BRIDGE=1.6.5

fail() {
    echo "${0##*/}: $*" >&2
    exit 1
}

say() {
    echo "--- $*"
}

# answers PYTHON LOWEST HIGHEST: whether PYTHON is a CPython 3.LOWEST to 3.HIGHEST that can build environments
answers() {
    "$1" -c "import ensurepip, sys, venv; sys.exit(not (3, $2) <= sys.version_info[:2] <= (3, $3))" >/dev/null 2>&1
}

# find_python LOWEST HIGHEST: prints the first interpreter of those minor versions, lowest first
find_python() {
    local minor candidate pyenv="${PYENV_ROOT:-$HOME/.pyenv}"
    if [[ -n "${DIP_PYTHON:-}" ]]; then
        answers "$DIP_PYTHON" "$1" "$2" && echo "$DIP_PYTHON"
        return
    fi
    for ((minor = $1; minor <= $2; minor++)); do
        # A shim of pyenv may exist and not answer: look at what it has installed, too.
        for candidate in "python3.$minor" "$pyenv/versions/3.$minor."*/bin/python "$pyenv/versions/3.$minor/bin/python"; do
            if answers "$candidate" "$minor" "$minor"; then
                command -v "$candidate"
                return
            fi
        done
    done
    if answers python3 "$1" "$2"; then
        command -v python3
        return
    fi
    return 1
}

# install VENV ARGUMENTS...: pip install, silent unless it fails
install() {
    local venv="$1" log="$1/install.log"
    shift
    "$venv/bin/python" -m pip install --disable-pip-version-check "$@" >>"$log" 2>&1 ||
        fail "installing failed: $(grep -E '^ERROR' "$log" | tail -1 || true) (all of it: $log)"
}

# build NAME PYTHON RECIPE: makes or reuses the environment NAME; its path is then in VENV
build() {
    local name="$1" python="$2" recipe="$3" stamp
    VENV="$VENV_DIR/$name"
    stamp="$(
        echo "$python $recipe"
        cksum <"$ROOT/pyproject.toml"
        cksum <"${BASH_SOURCE[0]}"
    )"
    if [[ -f "$VENV/stamp" && "$(cat "$VENV/stamp")" == "$stamp" ]]; then
        return
    fi
    say "Building the environment $name with $("$python" --version): some minutes and gigabytes, once"
    rm -rf "$VENV"
    mkdir -p "$VENV_DIR" || fail "can't write to $VENV_DIR; set DIP_VENV_DIR to a folder that can be written"
    "$python" -m venv "$VENV" || fail "$python can't build $VENV; name another interpreter in DIP_PYTHON"
    "$recipe" "$VENV"
    echo "$stamp" >"$VENV/stamp"
}

# Python 3.12 or newer: everything as its metadata says.
recipe_newest() {
    install "$1" torch "megatron-core==$MEGATRON" -e "$ROOT[megatron,test]"
}

# Python 3.11: the release has a wheel for it though its metadata asks for 3.12, and megatron.training misses just one
# name there, typing.override. Unsupported upstream: good enough to try this project, no ground for a cluster.
recipe_newest_on_311() {
    install "$1" torch numpy packaging pydantic pyyaml regex six triton typing_extensions -e "$ROOT[test]"
    install "$1" --no-deps --ignore-requires-python "megatron-core==$MEGATRON"
    echo "import typing, typing_extensions; typing.override = typing_extensions.override" \
        >"$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/typing_override.pth"
}

# Python 3.11 with the release meant for it.
recipe_core() {
    install "$1" torch packaging regex six "megatron-core==$MEGATRON_CORE" -e "$ROOT[test]"
}

# Megatron-Bridge, laid over the newest environment: torch, Megatron and the tests' own packages are that one's, so this
# takes half a minute and half a gigabyte where an environment of its own takes minutes and six, and the newest
# environment stays as users without Bridge have it. Bridge's metadata also asks for packages that build CUDA kernels or
# serve recipes and loggers that no test uses; what it imports is named here. ms-swift is laid beside it: it asks for
# older releases of two packages, and works with these.
recipe_bridge() {
    echo "import site; site.addsitedir('$(echo "$NEWEST"/lib/python3.*/site-packages)')" \
        >"$(echo "$1"/lib/python3.*/site-packages)/newest_environment.pth"
    install "$1" --no-compile accelerate datasets einops "hydra-core<1.4" "megatron-energon~=7.0" nvidia-modelopt \
        nvidia-resiliency-ext omegaconf peft requests "transformers>=5.8,<=5.12.1"
    install "$1" --no-compile --no-deps diffusers "megatron-bridge==$BRIDGE"
    install "$1" --no-compile dacite json_repair modelscope
    install "$1" --no-compile --no-deps "mcore-bridge==$MCORE_BRIDGE" "ms-swift==$SWIFT"
}

# newest_environment: the environment with the newest Megatron, on whatever Python answers; its path is then in VENV
newest_environment() {
    local python
    if python="$(find_python 12 13)"; then
        build .venv "$python" recipe_newest
    elif python="$(find_python 11 11)"; then
        build .venv "$python" recipe_newest_on_311
    else
        fail "no Python 3.11 to 3.13 with venv answers${DIP_PYTHON:+ as DIP_PYTHON=$DIP_PYTHON}; install one, or name it in DIP_PYTHON"
    fi
}

# compile_kernels: of the checkout, for VENV; else each process that plans would compile them at the same time as others.
compile_kernels() {
    "$VENV/bin/python" -c "from dip_megatron.planner.warm import warm_up_all; warm_up_all()"
}

# browser: installs Chromium for the tests of pages where that takes no question; without one they skip.
browser() {
    command -v chromium chromium-browser google-chrome >/dev/null && return
    if [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null; then
        say "Installing Chromium for the tests of pages"
        { apt-get update && apt-get install -y --no-install-recommends chromium; } >"$VENV/browser.log" 2>&1 ||
            say "Chromium can't be installed (see $VENV/browser.log): pages are not tested"
    fi
}

# bridge_environment: the environment with Megatron-Bridge, on top of newest_environment; its path is then in VENV. Fails
# without a word where that one's Python isn't the one that Bridge takes.
bridge_environment() {
    newest_environment
    NEWEST="$VENV"
    answers "$NEWEST/bin/python" 12 12 || return 1
    build .venv-bridge "$NEWEST/bin/python" recipe_bridge
}
