"""`python -m dwindle` is the `dwindle` command."""

from .frontends.cli import main

if __name__ == "__main__":
    main()
