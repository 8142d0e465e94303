#!/bin/sh
# Make a virtual environment with pinned dependencies. Usage: setup.sh VENV_FOLDER
set -eu

venv=$1
python=${PYTHON:-python3}
torch=2.13.0

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "solvus needs Python 3.11 or newer; '$python' is $("$python" --version 2>&1). Set PYTHON=python3.12, say." >&2
    exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || {
    echo "could not make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 1
}
pip="$venv/bin/python -m pip --disable-pip-version-check"

kind=${TORCH:-auto}
if [ "$kind" = auto ]; then
    kind=cpu
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then kind=cuda; fi
fi
if [ "$kind" = cpu ]; then
    # The CPU build is a tenth of the size. It lies in the package index at hand, or in PyTorch's own; if neither has it
    # (macOS builds carry no "+cpu"), the plain release is taken.
    $pip install -q -c constraints.txt "torch==$torch+cpu" 2>/dev/null ||
        $pip install -q --retries 1 --timeout 20 -c constraints.txt \
            --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu" 2>/dev/null ||
        $pip install -q -c constraints.txt "torch==$torch"
else
    $pip install -q -c constraints.txt "torch==$torch"
fi
$pip install -q -c constraints.txt -e '.[ui,s3,postgres,dev]'
echo "solvus is installed in $venv ($("$venv/bin/python" -c 'import torch; print("torch", torch.__version__)'))"
