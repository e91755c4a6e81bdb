"""``python -m detente.benchmark`` is the ``detente`` command."""

from detente.benchmark.cli import main

if __name__ == "__main__":
    main()
