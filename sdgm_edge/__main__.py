"""Run the command line as a module: `python -m sdgm_edge …`, which is also what `torchrun -m` takes."""

from .cli import main

main()
