"""The pages and docstrings build into a manual without a warning, and every public name is in it."""

import importlib
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.blocks import ROOT, block

PUBLIC = [
    "qmpvcpu",
    "qmpvcpu.bus",
    "qmpvcpu.certify",
    "qmpvcpu.domainxml",
    "qmpvcpu.errors",
    "qmpvcpu.fleet",
    "qmpvcpu.launch",
    "qmpvcpu.metrics",
    "qmpvcpu.testing",
    "qmpvcpu.testing.nats",
]


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manual as HTML; what Sphinx has to say against it fails whoever asks."""
    out = tmp_path_factory.mktemp("manual")
    options = ["-W", "-n", "-q", "--keep-going", "-b", "html", "-d", str(out / "doctrees")]
    (shown,) = block("docs/CONTRIBUTING.md", "building the manual").lines
    assert shown == "python -m sphinx -W -n docs docs/_build"
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(ROOT / "docs"), str(out / "html")],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    return out / "html"


def names_in(manual: Path) -> set[str]:
    """Every name of Python's that the manual has an anchor for, also by the module that defines it."""
    inventory = (manual / "objects.inv").read_bytes()
    listed = zlib.decompress(inventory.split(b"\n", 4)[4]).decode().splitlines()
    return {line.split()[0] for line in listed if line.split()[1].startswith("py:")}


def public_names(module: ModuleType) -> list[str]:
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return [name for name in getattr(module, "__all__", own) if not name.startswith("_")]


def test_every_public_name_is_in_the_reference(manual: Path) -> None:
    told = names_in(manual)
    missing = []
    for public in PUBLIC:
        module = importlib.import_module(public)
        for name in public_names(module):
            defined = getattr(getattr(module, name), "__module__", None)
            if not {f"{public}.{name}", f"{defined}.{name}", f"qmpvcpu.{name}"} & told:
                missing.append(f"{public}.{name}")
    assert missing == []


def test_the_manual_asks_nobody_for_anything(manual: Path) -> None:
    pages = list(manual.rglob("*.html"))
    assert len(pages) > 20
    fetched = [
        (page.name, line.strip())
        for page in pages
        for line in page.read_text().splitlines()
        if ("<script" in line or "<link" in line or "<img" in line) and ('src="http' in line or 'href="http' in line)
    ]
    assert fetched == []
