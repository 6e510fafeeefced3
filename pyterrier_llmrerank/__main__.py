"""Run the ``llmrerank`` command with ``python -m pyterrier_llmrerank``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
