"""From a prepared data set to a trained, measured model in a run folder."""
