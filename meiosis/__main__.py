"""`python -m meiosis`, the same as the `meiosis` command."""

from meiosis.cli.main import main

main()
