"""`python -m fastvgg` is the command line."""

from fastvgg.cli import main

main()
