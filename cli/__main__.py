"""`python -m layerskip_cli`, which torchrun needs."""

from .main import main

main()
