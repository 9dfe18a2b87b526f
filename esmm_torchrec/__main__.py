"""`python -m esmm_torchrec`, the same as the console script."""

from esmm_torchrec.cli.main import main

main()
