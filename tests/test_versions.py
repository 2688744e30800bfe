"""The combinations of versions: what is pinned for each, against what the package allows and the docs say."""

import re
from pathlib import Path

import pytest

from release import versions

ROOT = Path(__file__).parents[1]


def pins(name):
    text = versions.constraints(versions.COMBINATIONS[name])
    lines = [line for line in text.splitlines() if "python_version <" not in line]
    return dict(re.findall(r"^([\w-]+)==([^;\s]+)", "\n".join(lines), re.MULTILINE))


def test_the_default_is_what_constraints_txt_says():
    assert versions.constraints({}) == (ROOT / "constraints.txt").read_text()


def test_each_combination_changes_what_it_names_and_nothing_else():
    for name, own in versions.COMBINATIONS.items():
        assert pins(name) == pins("default") | own


def test_the_lowest_is_what_the_package_allows():
    text = (ROOT / "pyproject.toml").read_text()
    bounds = dict(re.findall(r'"(torch|triton|transformers)>=([\d.]+)', text))
    assert len(bounds) == 3
    for name, bound in bounds.items():
        assert f"{pins('lowest')[name]}.0.0".startswith(f"{bound}.0"), name


def test_a_name_that_is_not_pinned_is_a_mistake():
    with pytest.raises(ValueError, match="does not pin no-such-package"):
        versions.constraints({"no-such-package": "1.0"})


def test_the_docs_have_a_row_for_each_combination():
    rows = re.findall(r"^\| (\w+) \| (.*)$", (ROOT / "docs" / "versions.md").read_text(), re.MULTILINE)
    found = dict(reversed(rows))  # the first of each name
    assert versions.COMBINATIONS.keys() <= found.keys()
    for name in versions.COMBINATIONS:
        for package in ("torch", "triton", "transformers"):
            assert pins(name)[package] in found[name], (name, package)
