"""`python -m polyvit_kernels.aot`."""

from polyvit_kernels.aot.main import main

if __name__ == "__main__":
    main()
