"""Two import packages in one distribution: `polyvit_fast` and, from kernels/, `polyvit_kernels`."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["polyvit_fast", "polyvit_fast.*"]) + ["polyvit_kernels", "polyvit_kernels.ops"],
    package_dir={"polyvit_fast": "polyvit_fast", "polyvit_kernels": "kernels/polyvit_kernels"},
    package_data={"polyvit_fast": ["py.typed"], "polyvit_kernels": ["py.typed"]},
)
