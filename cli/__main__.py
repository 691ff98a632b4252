"""`python -m layerskip_cli`, which torchrun needs: pyproject.toml installs this folder under that name."""

from .main import main

main()
