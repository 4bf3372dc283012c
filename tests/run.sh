#!/usr/bin/env bash
# Installs what the tests need and runs all of them: lint, format, types, layers, then pytest with branch coverage.
# Arguments go to pytest; -n 0 runs the tests in one process, for a debugger.
# The last line counts: "N passed, N failed, N skipped"; each check before pytest counts as one.
# With CI=true a skip fails, unless it is on the list in tests/summary.py.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=$PWD/.venv/bin

if ! bash fixtures/install.sh tests; then
  echo "0 passed, 1 failed, 0 skipped"
  exit 1
fi

results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
passed=0
failed=()
check() {
  local name=$1
  shift
  echo "== $name"
  if "$@"; then passed=$((passed + 1)); else failed+=("$name"); fi
}

check "ruff check" "$bin/ruff" check .
check "ruff format" "$bin/ruff" format --check .
check "mypy --strict" "$bin/mypy" --strict
check "import layers" "$bin/lint-imports"

accelerator=$("$bin/python" -c 'if True:
  import asyncio
  from qmpvcpu.testing import best_qemu, probe_accelerator
  print(asyncio.run(probe_accelerator(best_qemu())))')
if [ "$accelerator" = kvm ]; then verdict="KVM runs the micro-guest here"; else verdict="KVM runs no guest here"; fi
echo "== pytest; $verdict"
status=0
# Two at a time, which is what CI has cores for: half of the time a test waits for a guest.
"$bin/pytest" -n 2 --dist loadscope --cov --cov-branch --junitxml="$results/junit.xml" "$@" || status=$?

"$bin/python" tests/summary.py --junit "$results/junit.xml" --pytest-status "$status" --checks-passed "$passed" \
  "${failed[@]/#/--check-failed=}"
