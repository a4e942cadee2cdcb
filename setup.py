"""Maps folders to packages; all other package metadata is in pyproject.toml.

`csrc/` and `kernels/` are at the top of the repository and are installed inside `sslfast`, so that site-packages holds
`sslfast` alone. Nothing is compiled here and torch is not imported: kernels are built at their first use.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sslfast", "sslfast.*"]), "sslfast.csrc", "sslfast.kernels"],
    package_dir={"sslfast.csrc": "csrc", "sslfast.kernels": "kernels"},
    package_data={
        "sslfast": ["py.typed", "report_page.html"],
        "sslfast.csrc": ["*.h", "*.cpp", "cpu/*.cpp", "cpu/*.h", "cuda/*.cu", "cuda/*.cuh", "cuda/*.h"],
    },
)
