"""Trains a model on a prepared data set, measures it, and writes its run folder."""
