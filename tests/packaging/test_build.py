"""What is in the wheel and in the sdist, and what they say of themselves."""

import email.message
import email.parser
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path

from tests.packaging.conftest import ROOT, Built

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(wheel: Path) -> email.message.Message:
    (text,) = (content for name, content in contents(wheel).items() if name.endswith(".dist-info/METADATA"))
    return email.parser.BytesParser().parsebytes(text)


def tracked(*directories: str) -> set[str]:
    """The files of the working tree that belong to the project: those that git knows, or would take."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *directories]
    listed = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def test_the_top_level_is_fixed() -> None:
    names = {name.partition("/")[0] for name in tracked(".")}
    fixed = {"pyproject.toml", "README.md", "LICENSE", "qmpvcpu", "tests", "fixtures", "docs"}
    assert {name for name in names if not name.startswith(".")} == fixed


def test_the_wheel_has_the_package_and_nothing_else(built: Built) -> None:
    packed = {name for name in contents(built.wheel) if ".dist-info/" not in name}
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    brought = {
        f"{place}{name.removeprefix(source)}"
        for source, place in wheel.get("force-include", {}).items()
        for name in tracked(source)
    }
    assert packed == tracked("qmpvcpu") | brought
    assert {"qmpvcpu/py.typed", "qmpvcpu/testing/microguest.rom", "qmpvcpu/__main__.py"} <= packed


def test_the_sdist_makes_the_wheel_that_the_tree_makes(built: Built) -> None:
    assert contents(built.wheel) == contents(built.from_tree)


def test_the_sdist_has_all_that_testing_and_packaging_needs(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = tracked("qmpvcpu", "tests", "fixtures", "docs") | {"pyproject.toml", "README.md", "LICENSE"}
    assert wanted - names == set()
    assert names - wanted <= {"PKG-INFO", ".gitignore"}


def test_the_metadata_names_what_it_is(built: Built) -> None:
    told = metadata(built.wheel)
    assert told["Name"] == "qmpvcpu"
    assert told["Version"] == "0.1.0"
    assert f"## {told['Version']}" in (ROOT / "docs" / "CHANGELOG.md").read_text()
    assert told["License-Expression"] == "Apache-2.0"
    assert told["Requires-Python"] == ">=3.11"
    assert told["Description-Content-Type"] == "text/markdown"
    assert told.get_payload() == (ROOT / "README.md").read_text()
    assert "Typing :: Typed" in told.get_all("Classifier", [])
    named = {each.partition(",")[0] for each in told.get_all("Project-URL", [])}
    assert named == {"Homepage", "Documentation", "Source", "Changelog", "Issues"}
    assert set(told.get_all("Provides-Extra", [])) == set(PROJECT["project"]["optional-dependencies"])


def test_the_core_requires_three_packages(built: Built) -> None:
    required = [each for each in metadata(built.wheel).get_all("Requires-Dist", []) if "extra ==" not in each]
    assert sorted(required) == ["aiofiles>=23.1", "lxml>=4.9", "qemu-qmp<0.1,>=0.0.3"]


def test_the_wheel_brings_the_command_and_the_licence(built: Built) -> None:
    (scripts,) = (content for name, content in contents(built.wheel).items() if name.endswith("/entry_points.txt"))
    assert b"[console_scripts]\nqmpvcpu = qmpvcpu.cli:main\n" in scripts
    (licence,) = (content for name, content in contents(built.wheel).items() if name.endswith("/licenses/LICENSE"))
    assert licence == (ROOT / "LICENSE").read_bytes()
