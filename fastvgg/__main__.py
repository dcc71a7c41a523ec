"""Run the command line as `python -m fastvgg`."""

from fastvgg.cli import main

main()
