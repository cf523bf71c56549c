"""Prints the lower bounds in pyproject.toml as constraints: python .ci/lowest.py > lowest.txt"""

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
requirements = [
    *project["dependencies"],
    *(line for name in extras if name not in ("cuda", "tpu") for line in extras[name]),
]
for requirement in sorted(set(requirements)):
    if ">=" in requirement:
        print(requirement.replace(">=", "==", 1))
