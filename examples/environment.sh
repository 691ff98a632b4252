# Sourced by other scripts. Makes the virtual environment $LAYERSKIP_ENV (default .venv) and installs this project with the
# extras "$1". Needs only Python 3.11 or newer, as $PYTHON (default python3).
PYTHON=${PYTHON:-python3}
LAYERSKIP_ENV=${LAYERSKIP_ENV:-.venv}
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed, found $("$PYTHON" --version 2>&1); set PYTHON=..." >&2
    exit 1
fi
unset PYTHONDONTWRITEBYTECODE # else every process compiles all modules of its packages again
[ -x "$LAYERSKIP_ENV/bin/python" ] || "$PYTHON" -m venv "$LAYERSKIP_ENV"
. "$LAYERSKIP_ENV/bin/activate"
python -m pip install --quiet --disable-pip-version-check --upgrade pip
python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".${1:-}" # modules compile when they are first imported
