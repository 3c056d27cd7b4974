"""What a newcomer's checkout and an installed package must hold."""

import re
import subprocess
import tomllib
from importlib import resources
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from s2seg.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
# joined here, so that this file does not find itself
HOME = re.compile("(?<![\\w.])/" + r"(?:home|root|Users|work|opt|mnt|workspace)/[\w.]")
REGISTRY = re.compile(
    "|".join(("py" + r"pi\.org", "python" + r"hosted\.org", "artifact" + "ory", "find-" + "links", "index-" + "url"))
)
PLATFORM_ONLY = re.compile(r"nvidia-|cuda-|triton$")  # torch asks for these on Linux alone


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def constraints() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def tracked_texts() -> dict[str, str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    texts = {}
    for name in filter(None, listed.stdout.split("\0")):
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" not in data:
            texts[name] = data.decode()
    return texts


def required(requirements: list[str], extras: dict[str, list[str]]) -> list[Requirement]:
    """Requirements with our own extras (`s2seg[torch]`) replaced by what they hold."""
    found = []
    for requirement in map(Requirement, requirements):
        if requirement.name == "s2seg":
            found += [r for extra in requirement.extras for r in required(extras[extra], extras)]
        else:
            found.append(requirement)
    return found


def closure(roots: list[Requirement]) -> dict[str, str]:
    """Canonical name -> version of everything installed here that `roots` pull in."""
    found, seen, waiting = {}, set(), list(roots)
    while waiting:
        requirement = waiting.pop()
        if (key := (canonicalize_name(requirement.name), *sorted(requirement.extras))) in seen:
            continue
        seen.add(key)
        try:
            installed = distribution(requirement.name)
        except PackageNotFoundError:
            continue  # an extra that this environment was built without
        found[key[0]] = installed.version
        extras = {"", *requirement.extras}
        wanted = map(Requirement, installed.requires or [])
        waiting += [r for r in wanted if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras)]
    return found


@pytest.mark.parametrize("pattern", [HOME, REGISTRY], ids=["machine paths", "registries"])
def test_tracked_files_name_no(pattern):
    hits = [f"{name}: {m.group()}" for name, text in tracked_texts().items() for m in pattern.finditer(text)]
    assert hits == []


def test_patterns_find_what_they_look_for():
    assert HOME.search("see /" + "home/ann/x") and not HOME.search("https://host.net/home/x")
    assert REGISTRY.search("https://py" + "pi.org/simple")


def test_constraints_are_bare_pins():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"#.*|[a-z0-9-]+==[\w.+!]+", line), line
        assert "://" not in line


def test_constraints_pin_all_that_is_needed():
    asked = required([*project()["dependencies"], "s2seg[dev,all]"], project()["optional-dependencies"])
    pins, installed = constraints(), closure(asked)
    assert {canonicalize_name(r.name) for r in asked} - set(pins) == set()
    assert {name for name in installed if not PLATFORM_ONLY.match(name)} - set(pins) == set()
    assert [r for r in asked if not r.specifier.contains(pins[canonicalize_name(r.name)])] == []


def test_extras_that_are_told_of_exist():
    texts = [text for name, text in tracked_texts().items() if name.startswith(("s2seg/", "docs/", "README"))]
    told = {name for text in texts for names in re.findall(r"s2seg\[([\w,]+)\]", text) for name in names.split(",")}
    logs = get_args(get_args(get_type_hints(TrainConfig)["logs"])[0])
    assert (told | set(logs)) - {"csv", "tensorboard"} - set(project()["optional-dependencies"]) == set()


def test_typed_marker_is_shipped():
    assert resources.files("s2seg").joinpath("py.typed").is_file()
    assert (
        "py.typed"
        in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["s2seg"]
    )


def test_version_is_the_changelogs():
    newest = re.search(r"^## (?:Unreleased \()?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == project()["version"]


def test_installed_version_is_the_projects():
    try:
        installed = version("s2seg")
    except PackageNotFoundError:
        pytest.skip("s2seg is not installed; `pip install -e .`")
    assert installed == project()["version"]
