"""`python -m outlay.runner`: the same as `outlay`."""

from outlay.runner.cli import main

if __name__ == "__main__":
    main()
