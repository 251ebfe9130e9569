"""`python -m resfuse` is the `resfuse` command."""

from resfuse.cli import main

if __name__ == "__main__":
    main()
