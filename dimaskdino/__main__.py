"""`python -m dimaskdino` is the command `dimaskdino`."""

from dimaskdino.cli import main

main()
