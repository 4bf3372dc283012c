"""Packages that import their modules when a name is asked for."""

import importlib
import subprocess
import sys

import pytest

import qmpvcpu

LAZY = ("qmpvcpu", "qmpvcpu.testing")


def said(code: str) -> str:
    """What *code* prints in an interpreter of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", LAZY)
def test_every_name_is_there_and_none_is_called_as_a_module_is(name: str) -> None:
    package = importlib.import_module(name)
    names: dict[str, object] = {}
    exec(f"from {name} import *", names)  # noqa: S102 -- that is what is tested
    assert set(package.__all__) <= names.keys()
    assert set(package.__all__) <= set(dir(package))
    for each in package.__all__:
        assert f"{name}.{each}" not in sys.modules
        assert getattr(package, each) is names[each]


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    loaded = "print(sorted(name for name in sys.modules if name.startswith('qmpvcpu.')))"
    assert said(f"import sys, qmpvcpu; {loaded}") == "['qmpvcpu.lazy']"
    assert "qmpvcpu.vm" not in said(f"import sys, qmpvcpu; qmpvcpu.VcpuMap; {loaded}")
    assert said("import qmpvcpu.errors; print(qmpvcpu.errors.QmpVcpuError is qmpvcpu.QmpVcpuError)") == "True"


@pytest.mark.parametrize("name", LAZY)
def test_a_name_that_is_not_there_is_told_as_of_any_module(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'Nonsense'"):
        _ = importlib.import_module(name).Nonsense
    with pytest.raises(ImportError, match="cannot import name 'Nonsense'"):
        exec(f"from {name} import Nonsense")  # noqa: S102 -- that is what is tested


def test_a_way_round_the_top_ends_at_the_same_things() -> None:
    assert said("from qmpvcpu.vm.attaching import attach; import qmpvcpu; print(qmpvcpu.attach is attach)") == (
        "True"
    )
    assert qmpvcpu.Layout is importlib.import_module("qmpvcpu.model.layout").Layout
