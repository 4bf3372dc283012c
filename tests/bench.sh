#!/usr/bin/env bash
# Measures qmpvcpu against raw QMP, and against libvirt, on this machine. Not part of the tests: numbers need a quiet machine.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash fixtures/install.sh bench
exec .venv/bin/python -m tests.bench "$@"
