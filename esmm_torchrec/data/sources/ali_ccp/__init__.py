"""Ali-CCP, the public data set of the ESMM paper, from its raw text."""
