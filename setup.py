"""Package metadata lives in pyproject.toml; this file only says which folder becomes which package.

`csrc/` and `kernels/` sit at the top of the repository and are installed inside `sslfast`, so that nothing but `sslfast`
appears in site-packages. Nothing is compiled here and torch is not imported: kernels are built at first use.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sslfast", "sslfast.*"]), "sslfast.csrc", "sslfast.kernels"],
    package_dir={"sslfast.csrc": "csrc", "sslfast.kernels": "kernels"},
    package_data={
        "sslfast": ["py.typed"],
        "sslfast.csrc": ["*.h", "*.cpp", "cpu/*.cpp", "cpu/*.h", "cuda/*.cu", "cuda/*.cuh", "cuda/*.h"],
    },
)
