"""A trained model at work: scores of prepared splits, of new files, of DataFrames."""
