"""Run the command line from a checkout: `python cli.py …` is `sdgm-edge …`."""

from sdgm_edge.cli import main

main()
