"""`python -m longroll` and `torchrun -m longroll`: the command line."""

from longroll.cli import main

main()
