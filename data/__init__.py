"""Embedded items, the phrases of the writing tasks, and what reads the rows of data sets."""
