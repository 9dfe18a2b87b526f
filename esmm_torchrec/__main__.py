"""Entry point of `python -m esmm_torchrec`, equivalent to the console script."""

from esmm_torchrec.cli.main import main

main()
