"""Everything is in pyproject.toml, but for the long description: the README, for readers who are not in the repository.

SAFE_KERNELS_URL, as https://github.com/OWNER/NAME, makes the README's links and pictures absolute, at the tag of this
version. The project has no public address yet. Without one, a link becomes its text, a picture its description, and the
line of badges goes.
"""

import os
import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
URL = os.environ.get("SAFE_KERNELS_URL", "").rstrip("/")
TAG = "v" + re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[0]
TO_A_FILE = re.compile(r"(!?)\[([^]]*)]\((?!https?://|#)([^)\s]+)\)")
BADGES, OF_A_BADGE = re.compile(r"^\[!\[.*\n", re.MULTILINE), re.compile(r"\)]\((?!https?://)([^)]+)\)")
PICTURE = re.compile(r"<picture>.*?alt=\"([^\"]+)\" src=\"([^\"]+)\".*?</picture>", re.DOTALL)  # in two themes


def absolute(link):
    mark, text, path = link.groups()
    return f"{mark}[{text}]({URL}/{'raw' if mark else 'blob'}/{TAG}/{path})" if URL else text


README = PICTURE.sub(r"![\1](\2)", (ROOT / "README.md").read_text(encoding="utf-8"))
README = (
    OF_A_BADGE.sub(rf")]({URL}/blob/{TAG}/\1)", README.replace("../../", f"{URL}/")) if URL else BADGES.sub("", README)
)

setup(
    long_description=TO_A_FILE.sub(absolute, README),
    long_description_content_type="text/markdown",
    project_urls={"Source": URL} if URL else {},
)
