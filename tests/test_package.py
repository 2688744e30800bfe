"""The wheel and the sdist: what is in them, what they say, and that the README's example runs from the wheel."""

import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")
ROOT = Path(__file__).parents[1]
PACKAGES = ("safe_kernels", "safe_train")
URL = "https://example.org/owner/safe-kernels"
BUILD = f"""
import os
from setuptools import build_meta
build_meta.build_wheel("dist")
os.environ["SAFE_KERNELS_URL"] = {URL!r}
build_meta.build_sdist("dist")
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the wheel, built without the project's address, and the sdist, built with it."""
    copy = tmp_path_factory.mktemp("package")
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copyfile(path, copy / path.name)
    environment = {name: value for name, value in os.environ.items() if name != "SAFE_KERNELS_URL"}
    built = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return copy / "dist"


@pytest.fixture(scope="module")
def wheel(dist):
    with zipfile.ZipFile(*dist.glob("*.whl")) as archive:
        yield archive


@pytest.fixture(scope="module")
def sdist(dist):
    with tarfile.open(*dist.glob("*.tar.gz")) as archive:
        yield archive


def shipped():
    """The packages' files, as the repository has them."""
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*"))
    files = (path.relative_to(ROOT).as_posix() for path in paths if path.is_file())
    return {name for name in files if "__pycache__" not in name}


def metadata(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def links(text):
    return re.findall(r"]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)


def test_a_wheel_has_the_packages_with_their_types_and_settings_and_the_licence(wheel):
    info = {name for name in wheel.namelist() if ".dist-info/" in name}
    assert set(wheel.namelist()) - info == shipped()
    assert {"safe_kernels/py.typed", "safe_train/py.typed", "safe_train/configs/demo.yaml"} < shipped()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in info)


def test_a_wheel_needs_pytorch_and_triton_alone(wheel):
    needed = [line for line in metadata(wheel).get_all("Requires-Dist") if "extra ==" not in line]
    assert [re.match(r"\w+", line).group() for line in needed] == ["torch", "triton"]


def test_a_sdist_builds_the_wheel_and_has_no_tests_that_cannot_run(sdist):
    names = {name.partition("/")[2] for name in sdist.getnames()}
    assert shipped() < names
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md"} < names
    assert not any(name.split("/")[0] in ("tests", "bench") for name in names)


def test_the_readme_without_an_address_has_no_link_into_the_repository(wheel):
    about = metadata(wheel)
    assert about["Description-Content-Type"] == "text/markdown" and about.get_all("Project-URL") is None
    found = links(about.get_payload())
    assert all(link.startswith("https://") for link in found) and "shields.io" not in about.get_payload()
    assert "Architecture: where a call goes" in about.get_payload()  # the text of a link that was one
    assert "Memory and time of log-prob" in about.get_payload()  # what the picture shows


def test_the_readme_with_an_address_links_to_the_files_of_this_version(wheel, sdist):
    (name,) = [name for name in sdist.getnames() if name.endswith("/PKG-INFO") and name.count("/") == 1]
    about = email.message_from_bytes(sdist.extractfile(name).read())
    assert about.get_all("Project-URL") == [f"Source, {URL}"]
    tag = "v" + metadata(wheel)["Version"]
    others = ("https://arxiv.org/", "https://img.shields.io/badge/", f"{URL}/actions/workflows/ci.yml")
    own = [link for link in links(about.get_payload()) if not link.startswith(others)]
    kinds = {link.removeprefix(f"{URL}/").split("/")[0] for link in own}
    assert kinds == {"blob", "raw"} and any("headline-light.png" in link for link in own)
    assert (
        f"[![tests]({URL}/actions/workflows/ci.yml/badge.svg)]({URL}/actions/workflows/ci.yml)" in about.get_payload()
    )
    for link in own:
        kind, path = link.removeprefix(f"{URL}/").partition(f"/{tag}/")[::2]
        assert (ROOT / path.partition("#")[0]).exists() and (kind == "raw") == path.endswith(".png"), link


def test_the_readmes_example_runs_from_the_wheel_alone(wheel, tmp_path):
    wheel.extractall(tmp_path)
    example = (ROOT / "README.md").read_text().partition("```python\n")[2]
    code = example.partition("```")[0] + "import safe_kernels; print(safe_kernels.__file__, hidden.grad.abs().sum())"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True
    )
    assert ran.returncode == 0, ran.stderr.decode()
    file, total = ran.stdout.decode().split("tensor")[0].split()[0], float(re.search(rb"\((.*)\)", ran.stdout)[1])
    assert Path(file).is_relative_to(tmp_path) and total > 0


def test_what_a_wheel_installs_as_commands_and_plugins_is_there(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(name).decode())
    targets = [target for section in parser.sections() for target in parser[section].values()]
    assert "safe_train.cli:main" in targets
    for target in targets:
        module, _, function = target.partition(":")
        source = wheel.read(module.replace(".", "/") + ".py").decode()
        assert f"def {function}(" in source if function else source
