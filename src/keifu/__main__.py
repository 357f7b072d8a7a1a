"""`python -m keifu` is `keifu`."""

from keifu.cli import main

if __name__ == "__main__":
    main()
