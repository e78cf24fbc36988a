"""What pyproject.toml cannot say: the folders at the top of the checkout that the wheel carries as data.

`fastmtp.inputs.resource` finds them in both places.
"""

from setuptools import find_packages, setup

DATA = {
    "configs": ["*.yaml", "*.json", "data/*.yaml"],
    "examples": ["*.jsonl", "*.py", "questions/*.jsonl"],
    "vocab": ["*/*.pt", "*/*.json"],
}

setup(
    packages=[
        *find_packages(include=["fastmtp*", "evaluation*"]),
        *(f"fastmtp.resources.{name}" for name in DATA),
    ],
    package_dir={f"fastmtp.resources.{name}": name for name in DATA},
    package_data={f"fastmtp.resources.{name}": patterns for name, patterns in DATA.items()}
    | {"fastmtp": ["py.typed", "heads/README.md", "heads/*/*.safetensors"]},
)
