"""`python -m polyvit_fast` is `polyvit-fast`."""

from polyvit_fast.cli import main

main()
